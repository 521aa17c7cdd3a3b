"""Compiled WKV-5 kernels beside the loop that defines them, on inputs small enough to be compared before a kernel's first use."""

import functools
from typing import Any

import torch
from torch import Tensor

from rwkv_dpo.kernels.agreement import Compare
from rwkv_dpo.kernels.wkv5 import reference

# More than the tokens of a segment on a GPU, a few, and a sequence without any.
_LENGTHS = (67, 0, 5)
_HEADS, _HEAD_SIZE = 2, 64
_RESULTS = ("y", "states", *(f"gradient of {name}" for name in ("r", "k", "v", "time_decay", "u", "state0")))


def comparison(wkv5: Any, device: torch.device) -> Compare:
    """Values and gradients of `wkv5` on a device and of the reference in float64 on the CPU, from the same random inputs."""

    def compare(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        (*rkv, time_decay, u, state0), grads, expected = oracle()
        found = _results(wkv5, [*(x.to(device, dtype) for x in rkv), *(x.to(device) for x in (time_decay, u, state0))], grads)
        return dict(zip(_RESULTS, zip(found, expected, strict=True), strict=True))

    oracle = functools.cache(_oracle)
    return compare


def _oracle() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Inputs, gradients of the outputs, and what the reference makes of them."""
    random = torch.Generator().manual_seed(0)
    rows, states = (sum(_LENGTHS), _HEADS, _HEAD_SIZE), (len(_LENGTHS), _HEADS, _HEAD_SIZE, _HEAD_SIZE)
    drawn = [torch.randn(shape, generator=random) for shape in (rows, rows, rows, rows[1:], rows[1:], states, rows, states)]
    # Exact in 16 bits of either kind, so that one twin serves all.
    drawn = [x.bfloat16().half().float() if x.shape == torch.Size(rows) else x for x in drawn]
    inputs, grads = drawn[:6], drawn[6:]
    return inputs, grads, _results(reference.wkv5, [x.double() for x in inputs], grads)


def _results(wkv5: Any, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    bounds = torch.tensor([0, *_LENGTHS]).cumsum(0).to(torch.int32)
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = wkv5(*inputs[:5], bounds, inputs[5])
    return [*outputs, *torch.autograd.grad(outputs, inputs, [g.to(y) for g, y in zip(grads, outputs, strict=True)])]
