"""What stands before the products of a block's halves, as Preparations over rwkv_dpo.kernels.fused."""

from collections.abc import Callable, Sequence
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

    def __init__(self, forest: Forest, of_before: bool = False) -> None:
        """of_before: whether mixes say how much of the row before there is."""
        self.of_before = of_before
        self.rows = Rows(forest.before, forest.uses_start, forest.uses, forest.last_rows, forest.n_roots)

    def make(self, *inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """See Preparation."""
        x, handed_in, weight, bias, *mixing = inputs
        mixed, last = implementation(x).mixes(self.rows, x, handed_in, weight, bias, mixing, NORM_EPS, self.of_before)
        return mixed.unbind(), (last, x)

    def gradients(self, inputs: Gradients, g_prepared: Gradients, g_others: Gradients) -> Gradients:
        """See Preparation."""
        x, handed_in, weight, bias, *mixing = inputs
        assert x is not None
        g_prepared = [*g_prepared, *[None] * (len(mixing) - len(g_prepared))]
        given = (self.rows, x, handed_in, weight, bias, mixing, NORM_EPS)
        return implementation(x).mixes_gradients(*given, g_prepared, *g_others, self.of_before)


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


class BonusNorm:
    """Group norm with one group a head, what the token adds of its own, times the gate. Inputs: y [S, H, N], gate [S, C], r, k, v
    [S, H, N], r_k, the norm's weight and bias."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def make(self, *inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """See Preparation."""
        return (implementation(inputs[0]).bonus_norm(*inputs, self.eps),), ()

    def gradients(self, inputs: Gradients, g_prepared: Gradients, g_others: Gradients) -> Gradients:
        """See Preparation."""
        y, *others = inputs
        assert y is not None
        return implementation(y).bonus_norm_gradients(y, *others, self.eps, g_prepared[0])


class Activation:
    """A function of each number, whose gradient is one of its result."""

    def __init__(self, function: Callable[[Tensor], Tensor], gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
        """gradient: of (that of the result, the result)."""
        self.function, self.gradient = function, gradient

    def make(self, *inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """See Preparation."""
        return (self.function(inputs[0]),), ()

    def gradients(self, inputs: Gradients, g_prepared: Gradients, g_others: Gradients) -> Gradients:
        """See Preparation."""
        assert inputs[0] is not None
        assert g_prepared[0] is not None
        return (self.gradient(g_prepared[0], self.function(inputs[0])),)


TANH = Activation(torch.tanh, torch.ops.aten.tanh_backward)
SIGMOID = Activation(torch.sigmoid, torch.ops.aten.sigmoid_backward)


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


def fused(name: str, *inputs: Tensor, **sizes: int) -> Any:
    """A function of rwkv_dpo.kernels.fused, of which autograd keeps the inputs alone."""
    return _Fused.apply(name, sizes, *inputs)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, sizes, *inputs):
        ctx.name, ctx.sizes = name, sizes
        ctx.save_for_backward(*inputs)
        return getattr(implementation(inputs[0]), name)(*inputs, **sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        inputs = ctx.saved_tensors
        return None, None, *getattr(implementation(inputs[0]), f"{ctx.name}_gradients")(*inputs, *ctx.sizes.values(), *grads)
