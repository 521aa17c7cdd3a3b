"""RWKV-7 ("Goose", x070): a state from which each token takes something out before it writes. Paper: arXiv:2503.14456.

r receptance, k key, v value, w decay, a in-context learning rate, kk what is taken out, g gate.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_dpo.batches.forest import Forest
from rwkv_dpo.kernels.backends import WKV
from rwkv_dpo.kernels.fused import implementation
from rwkv_dpo.model.halves import SIGMOID, TANH, BonusNorm, Entry, LookingBack, ReluSquared, fused
from rwkv_dpo.model.in_place_of_layers import Both
from rwkv_dpo.model.linear import GIVEN, Linear, Matrix, Preparation, products
from rwkv_dpo.model.rwkv import LayerNorm, Mixes, run_forest
from rwkv_dpo.model.shape import ModelShape


class TimeMix(LookingBack):
    """The half of a block that looks back, and the WKV recurrence. The first layer's values, v_first, go along to the others, which
    mix them into their own."""

    w0: nn.Parameter
    a0: nn.Parameter
    v0: nn.Parameter

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__(shape)
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, shape.n_embd)))
        self.matrices: dict[str, Matrix] = {}
        # Nothing would read v0, v1 and v2 of the first layer.
        for name, rank in zip("wavg", shape.ranks, strict=True):
            if name == "v" and layer == 0:
                continue
            if name != "g":
                self.register_parameter(f"{name}0", nn.Parameter(torch.empty(1, 1, shape.dim_att)))
            self.register_parameter(f"{name}1", nn.Parameter(torch.empty(shape.n_embd, rank)))
            self.register_parameter(f"{name}2", nn.Parameter(torch.empty(rank, shape.dim_att)))
            self.matrices |= {part: Matrix(self, part) for part in (f"{name}1", f"{name}2")}
        self.k_k = nn.Parameter(torch.empty(1, 1, shape.dim_att))
        self.k_a = nn.Parameter(torch.empty(1, 1, shape.dim_att))
        self.r_k = nn.Parameter(torch.empty(shape.n_head, shape.head_size))
        self.add_projections(shape, "receptance", "key", "value")

    def forward(
        self, x: Tensor, norm: LayerNorm, forest: Forest, before: Tensor | None, initial: Tensor | None, wkv: WKV,
        v_first: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """As RWKV-5's; v_first [S, C] is None before the first layer."""
        mixing, low = (getattr(self, f"x_{name}") for name in "rwkvag"), self.matrices
        value = self.value if v_first is None else Both(self.value, low["v1"])
        layers = (self.receptance, low["w1"], self.key, value, low["a1"], low["g1"])
        (r, w, k, v, a, g), (last, x) = products(Entry(forest, True), (x, before, norm.weight, norm.bias, *mixing), layers)
        w, a, g = self._second("w", w, TANH), self._second("a", a), self._second("g", g, SIGMOID)
        if v_first is None:
            v_first = v
        else:
            v, depth = v
            v = fused("blend", v, v_first, self._second("v", depth), self.v0)
        k, taken, put_back = fused("delta_keys", k, a, self.a0, self.k_k, self.k_a, n_heads=self.n_head)
        log_w = log_decay(w, self.w0)

        inputs = tuple(part.view(-1, self.n_head, self.head_size) for part in (r, k, v, taken, put_back, log_w))
        y, ends = run_forest(wkv, forest, initial, inputs, ())
        (out,), _ = products(BonusNorm(self.norm_eps), (y, g, *inputs[:3], self.r_k, self.ln_x.weight, self.ln_x.bias), [self.output])
        return x + out, last, ends, v_first

    def _second(self, name: str, x: Tensor, between: Preparation = GIVEN) -> Tensor:
        """The second product of a low-rank part."""
        return products(between, (x,), [self.matrices[f"{name}2"]])[0][0]


class ChannelMix(nn.Module):
    """The half of a block that looks at each token, and the one before it, alone."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, shape.n_embd))
        self.key = Linear(shape.n_embd, shape.dim_ffn)
        self.value = Linear(shape.dim_ffn, shape.n_embd)

    def forward(self, x: Tensor, norm: LayerNorm, forest: Forest, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """As RWKV-5's."""
        (k,), (last, x) = products(Entry(forest, True), (x, before, norm.weight, norm.bias, self.x_k), [self.key])
        (value,), _ = products(ReluSquared(), (k,), [self.value])
        return x + value, last


def log_decay(own: Tensor, w0: Tensor) -> Tensor:
    """log w = -exp(-0.5) sigmoid(w0 + own), in fp32 at least."""
    return _LogDecay.apply(own, w0)


class _LogDecay(torch.autograd.Function):
    """Keeps its result alone, which the recurrence keeps too."""

    @staticmethod
    def forward(ctx, own, w0):
        log_w = implementation(own).log_decay(own, w0)
        ctx.save_for_backward(log_w)
        ctx.type_of_own, ctx.w0 = own.dtype, (w0.dtype, w0.shape)
        return log_w

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (log_w,) = ctx.saved_tensors
        g_own, g_w0 = implementation(log_w).log_decay_gradients(log_w, grad, ctx.type_of_own)
        dtype, shape = ctx.w0
        return g_own, g_w0.view(shape).to(dtype)


def _rank(factor: float) -> Callable[[int], int]:
    return partial(_nearest_rank, factor)


def _nearest_rank(factor: float, n_embd: int) -> int:
    return max(32, round(factor * math.sqrt(n_embd) / 32) * 32)


RANKS = {"att.w1": _rank(2.5), "att.a1": _rank(2.5), "att.v1": _rank(1.7), "att.g1": _rank(5.0)}
MIXES = Mixes("7", TimeMix, ChannelMix, "att.r_k", RANKS)
