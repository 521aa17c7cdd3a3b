"""What backends share: the decay of a state, and what the compiled ones demand of their inputs."""

from functools import lru_cache

import torch
from torch import Tensor

from rwkv_dpo.base.errors import InputError

# The types the kernels offer, by the code they know them under.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def check_inputs(
    backend: str, r: Tensor, k: Tensor, v: Tensor, time_decay: Tensor, u: Tensor, cu_seqlens: Tensor, state0: Tensor | None
) -> None:
    """InputError for a type or head size that the kernels don't offer; ValueError for shapes that don't fit together: raw pointers
    follow, so that a wrong shape would be a wild read."""
    check_types(backend, r, k, v, time_decay, u)
    _, n_heads, head_size = r.shape
    _check_shapes(r, state0=(state0, (cu_seqlens.numel() - 1, n_heads, head_size, head_size)))
    _check_bounds(bytes_of(cu_seqlens), len(r))


def check_types(backend: str, r: Tensor, k: Tensor, v: Tensor, time_decay: Tensor, u: Tensor) -> None:
    """The part of it that is no layout."""
    if r.dtype not in DTYPES or not r.dtype == k.dtype == v.dtype:
        raise InputError(
            f"WKV backend {backend} takes r, k and v of one type among fp32, bf16 and fp16, not {r.dtype}, {k.dtype}, {v.dtype}; "
            "float64 runs on --wkv_backend reference or chunked"
        )
    head_size = r.shape[2]
    if head_size % 8 or not 8 <= head_size <= 128:
        raise InputError(f"WKV backend {backend}: head size {head_size}; accepted are multiples of 8 up to 128")
    _check_shapes(r, k=(k, r.shape), v=(v, r.shape), time_decay=(time_decay, r.shape[1:]), u=(u, r.shape[1:]))


def _check_shapes(r: Tensor, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (x, shape) in expected.items():
        if x is not None and (x.shape != torch.Size(shape) or x.device != r.device):
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}, beside r {tuple(r.shape)} on {r.device}")


def bytes_of(cu_seqlens: Tensor) -> bytes:
    """As int32: what a layout of sequences is known by."""
    return cu_seqlens.to(torch.int32).numpy().tobytes()


# Layers ask for the same ones again and again.
@lru_cache(maxsize=64)
def _check_bounds(cu_seqlens: bytes, n_tokens: int) -> None:
    bounds = torch.frombuffer(bytearray(cu_seqlens), dtype=torch.int32)
    if bounds[0] != 0 or bounds[-1] != n_tokens or (bounds.diff() < 0).any():
        raise ValueError(f"cu_seqlens {bounds.tolist()} must rise from 0 to the number of tokens, {n_tokens}")


def decay_rate(time_decay: torch.Tensor) -> torch.Tensor:
    """-log w = exp(time_decay), in its type.

    The bound changes no w and no gradient: beyond 6.7 both are 0 in float64 too. Without it, exp overflows from 88.8 in fp32 and
    from 709.8 in float64, and infinity times a w, or a step count, of 0 is NaN.
    """
    return torch.exp(time_decay.clamp(max=10))
