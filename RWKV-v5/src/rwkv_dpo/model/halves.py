"""What stands before the products of a block's halves, as Preparations over rwkv_dpo.kernels.fused."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_dpo.batches.forest import Forest
from rwkv_dpo.kernels.fused import Rows, implementation
from rwkv_dpo.model.linear import Linear
from rwkv_dpo.model.rwkv import LayerNorm
from rwkv_dpo.model.shape import ModelShape

Gradients = Sequence[Tensor | None]

# Of every norm over channels.
NORM_EPS = 1e-5


class LookingBack(nn.Module):
    """What the time mixes of all versions have: projections, and a norm of the recurrence's output."""

    receptance: Linear
    key: Linear
    value: Linear
    gate: Linear
    output: Linear
    ln_x: LayerNorm
    norm_eps: float

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.n_head, self.head_size = shape.n_head, shape.head_size

    def add_projections(self, shape: ModelShape, *names: str) -> None:
        """Those of the input by these names, and of the output."""
        for name in names:
            setattr(self, name, Linear(shape.n_embd, shape.dim_att))
        self.output = Linear(shape.dim_att, shape.n_embd)
        self.ln_x = LayerNorm(shape.dim_att)
        # Dividing the norm's input by head_size_divisor, as RWKV-LM does, is the same as multiplying eps by its square.
        self.norm_eps = NORM_EPS * shape.head_size_divisor**2


class Entry:
    """A half's entry: the norm of the rows, and mixes of each with the one before it. Inputs: x [S, C], handed_in [n_roots, C] or None, the
    norm's weight and bias, and a vector a mix; the other results are the n of segments' last rows [n, C], and x for the way past the half,
    whose gradient is added in the same pass."""

    def __init__(self, forest: Forest) -> None:
        self.rows = Rows(forest.before, forest.uses_start, forest.uses, forest.last_rows, forest.n_roots)

    def make(self, *inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """See Preparation."""
        x, handed_in, weight, bias, *mixing = inputs
        mixed, last = implementation(x).mixes(self.rows, x, handed_in, weight, bias, mixing, NORM_EPS)
        return mixed.unbind(), (last, x)

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
