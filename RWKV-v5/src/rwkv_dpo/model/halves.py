"""What stands before the products of a block's halves, as Preparations over rwkv_dpo.kernels.fused."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_dpo.batches.forest import Forest
from rwkv_dpo.kernels.fused import Rows, implementation

Gradients = Sequence[Tensor | None]

# Of every norm over channels.
NORM_EPS = 1e-5


class Entry:
    """A half's entry: the norm of the rows, and mixes of each with the one before it. Inputs: x [S, C], handed_in [n_roots, C] or None, the
    norm's weight and bias, and a vector a mix; the other result is the n of segments' last rows [n, C]."""

    def __init__(self, forest: Forest) -> None:
        self.rows = Rows(forest.before, forest.uses_start, forest.uses, forest.last_rows, forest.n_roots)

    def make(self, *inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """See Preparation."""
        x, handed_in, weight, bias, *mixing = inputs
        mixed, last = implementation(x).mixes(self.rows, x, handed_in, weight, bias, mixing, NORM_EPS)
        return mixed.unbind(), (last,)

    def gradients(self, inputs: Gradients, g_prepared: Gradients, g_others: Gradients) -> Gradients:
        """See Preparation."""
        x, handed_in, weight, bias, *mixing = inputs
        assert x is not None
        g_prepared = [*g_prepared, *[None] * (len(mixing) - len(g_prepared))]
        return implementation(x).mixes_gradients(self.rows, x, handed_in, weight, bias, mixing, NORM_EPS, g_prepared, *g_others)


class GatedNorm:
    """Group norm with one group a head, times silu(gate). Inputs: y [S, H, N], gate [S, C], the norm's weight and bias."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def make(self, *inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """See Preparation."""
        return (implementation(inputs[0]).gated_norm(*inputs, self.eps),), ()

    def gradients(self, inputs: Gradients, g_prepared: Gradients, g_others: Gradients) -> Gradients:
        """See Preparation."""
        y, *others = inputs
        assert y is not None
        return implementation(y).gated_norm_gradients(y, *others, self.eps, g_prepared[0])


class ReluSquared:
    """max(x, 0) ** 2."""

    def make(self, *inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """See Preparation."""
        (x,) = inputs
        return (implementation(x).relu_squared(x),), ()

    def gradients(self, inputs: Gradients, g_prepared: Gradients, g_others: Gradients) -> Gradients:
        """See Preparation."""
        (x,) = inputs
        assert x is not None
        return implementation(x).relu_squared_gradients(x, g_prepared[0])


def sigmoid_gate(gate: Tensor, value: Tensor) -> Tensor:
    """sigmoid(gate) * value, which keeps its inputs alone."""
    return _SigmoidGate.apply(gate, value)


class _SigmoidGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, value):
        ctx.save_for_backward(gate, value)
        return implementation(gate).sigmoid_gate(gate, value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, value = ctx.saved_tensors
        return implementation(gate).sigmoid_gate_gradients(gate, value, grad)
