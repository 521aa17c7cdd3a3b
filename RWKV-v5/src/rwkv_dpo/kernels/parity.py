"""Compiled recurrences beside the loops that define them, on inputs small enough to be compared before a kernel's first use."""

import functools
import importlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_dpo.kernels.agreement import Compare
from rwkv_dpo.kernels.backends import WKV

# More than the tokens of a segment on a GPU, a few, and a sequence without any.
_LENGTHS = (67, 0, 5)
_HEADS, _HEAD_SIZE = 2, 64
_ROWS = (sum(_LENGTHS), _HEADS, _HEAD_SIZE)
_STATES = (len(_LENGTHS), _HEADS, _HEAD_SIZE, _HEAD_SIZE)


class _Oracle(NamedTuple):
    """Inputs of a recurrence but for cu_seqlens, n_rows of which come in 16 bits too, gradients of its outputs, and what the reference
    makes of them."""

    names: Sequence[str]
    n_rows: int
    inputs: list[Tensor]
    grads: list[Tensor]
    expected: list[Tensor]


def comparison(version: str, wkv: WKV, device: torch.device) -> Compare:
    """Values and gradients of `wkv`, of a model version ("5"), on a device, and of the reference in float64 on the CPU."""

    def compare(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        names, n_rows, inputs, grads, expected = oracle()
        found = _results(wkv, [x.to(device, dtype if i < n_rows else x.dtype) for i, x in enumerate(inputs)], grads)
        results = ("y", "states", *(f"gradient of {name}" for name in names))
        return dict(zip(results, zip(found, expected, strict=True), strict=True))

    oracle = functools.cache(lambda: _oracle(version))
    return compare


def _oracle(version: str) -> _Oracle:
    random = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=random)

    r, k, v, gy = (_narrow(drawn(_ROWS)) for _ in range(4))
    match version:
        case "5":
            given = {"r": r, "k": k, "v": v, "time_decay": drawn(_ROWS[1:]), "u": drawn(_ROWS[1:])}
        case "6":
            given = {"r": r, "k": k, "v": v, "log_w": -drawn(_ROWS).exp(), "u": drawn(_ROWS[1:])}
        case _:
            taken = F.normalize(drawn(_ROWS), dim=-1)
            put_back = _narrow(taken * drawn(_ROWS).sigmoid())
            given = {"r": r, "k": k, "v": v, "a": _narrow(-taken), "b": put_back, "log_w": -0.6 * drawn(_ROWS).sigmoid()}
    given["state0"] = drawn(_STATES)
    grads, inputs = [gy, drawn(_STATES)], list(given.values())
    reference = importlib.import_module(f"rwkv_dpo.kernels.wkv{version}.reference")
    expected = _results(getattr(reference, f"wkv{version}"), [x.double() for x in inputs], grads)
    return _Oracle(list(given), 5 if version == "7" else 3, inputs, grads, expected)


def _narrow(x: Tensor) -> Tensor:
    """Exact in 16 bits of either kind, so that one reference serves all."""
    return x.bfloat16().half().float()


def _results(wkv: WKV, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    bounds = torch.tensor([0, *_LENGTHS]).cumsum(0).to(torch.int32)
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = wkv(*inputs[:-1], bounds, inputs[-1])
    return [*outputs, *torch.autograd.grad(outputs, inputs, [g.to(y) for g, y in zip(grads, outputs, strict=True)])]
