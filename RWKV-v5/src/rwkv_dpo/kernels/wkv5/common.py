"""What backends of WKV-5 share: the decay of a state, and what the compiled ones demand of their inputs."""

import torch
from torch import Tensor

from rwkv_dpo.kernels import backends


def check_inputs(
    backend: str, r: Tensor, k: Tensor, v: Tensor, time_decay: Tensor, u: Tensor, cu_seqlens: Tensor, state0: Tensor | None
) -> None:
    """InputError for a type or head size that the kernels don't offer; ValueError for shapes that don't fit together."""
    check_types(backend, r, k, v, time_decay, u)
    backends.check_layout(r, cu_seqlens, state0)


def check_types(backend: str, r: Tensor, k: Tensor, v: Tensor, time_decay: Tensor, u: Tensor) -> None:
    """The part of it that is no layout."""
    backends.check_types(backend, {"r": r, "k": k, "v": v}, per_head={"time_decay": time_decay, "u": u})


def decay_rate(time_decay: torch.Tensor) -> torch.Tensor:
    """-log w = exp(time_decay), in its type.

    The bound changes no w and no gradient: beyond 6.7 both are 0 in float64 too. Without it, exp overflows from 88.8 in fp32 and
    from 709.8 in float64, and infinity times a w, or a step count, of 0 is NaN.
    """
    return torch.exp(time_decay.clamp(max=10))
