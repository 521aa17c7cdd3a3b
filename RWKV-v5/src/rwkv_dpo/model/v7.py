"""RWKV-7 ("Goose", x070): a state from which each token takes something out before it writes. Paper: arXiv:2503.14456.

r receptance, k key, v value, w decay, a in-context learning rate, kk what is taken out, g gate.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_dpo.batches.forest import Forest
from rwkv_dpo.kernels.backends import WKV
from rwkv_dpo.model.linear import Linear, Prepare, product
from rwkv_dpo.model.recompute import made_twice
from rwkv_dpo.model.rwkv import LayerNorm, Mixes, run_levels
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.model.v5 import relu_squared
from rwkv_dpo.model.v6 import head_norm, towards_before

# The fastest decay: log w lies between this and 0.
_LEAST_LOG_W = -math.exp(-0.5)


class TimeMix(nn.Module):
    """The half of a block that looks back, and the WKV recurrence. The first layer's values, v_first, go along to the others, which
    mix them into their own."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.n_head, self.head_size = shape.n_head, shape.head_size
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, shape.n_embd)))
        # Nothing would read v0, v1 and v2 of the first layer.
        for name, rank in zip("wavg", shape.ranks, strict=True):
            if name == "v" and layer == 0:
                continue
            if name != "g":
                self.register_parameter(f"{name}0", nn.Parameter(torch.empty(1, 1, shape.dim_att)))
            self.register_parameter(f"{name}1", nn.Parameter(torch.empty(shape.n_embd, rank)))
            self.register_parameter(f"{name}2", nn.Parameter(torch.empty(rank, shape.dim_att)))
        self.k_k = nn.Parameter(torch.empty(1, 1, shape.dim_att))
        self.k_a = nn.Parameter(torch.empty(1, 1, shape.dim_att))
        self.r_k = nn.Parameter(torch.empty(shape.n_head, shape.head_size))
        self.receptance = Linear(shape.n_embd, shape.dim_att)
        self.key = Linear(shape.n_embd, shape.dim_att)
        self.value = Linear(shape.n_embd, shape.dim_att)
        self.output = Linear(shape.dim_att, shape.n_embd)
        self.ln_x = LayerNorm(shape.dim_att)
        # Dividing the norm's input by head_size_divisor, as RWKV-LM does, is the same as multiplying eps by its square.
        self.norm_eps = 1e-5 * shape.head_size_divisor**2

    def forward(
        self, x: Tensor, before: Tensor, forest: Forest, initial: Tensor | None, wkv: WKV, v_first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x and the tokens before it [S, C] -> out [S, C], WKV states at the segments' ends [n, H, N, N], v_first [S, C], which is None
        before the first layer."""
        r, k, v = (
            layer(x, before, self.get_parameter(f"x_{name}"), prepare=towards_before)
            for name, layer in (("r", self.receptance), ("k", self.key), ("v", self.value))
        )
        w = self._low_rank("w", x, before, torch.tanh)
        a = self._low_rank("a", x, before)
        g = self._low_rank("g", x, before, torch.sigmoid)
        if v_first is None:
            v_first = v
        else:
            (v,) = made_twice(_mix_first, v, v_first, self._low_rank("v", x, before), self.get_parameter("v0"))
        k, taken, put_back = made_twice(self.keys, k, a, self.get_parameter("a0"), self.k_k, self.k_a)
        log_w = log_decay(w, self.get_parameter("w0"))
        rows = tuple(one.view(-1, self.n_head, self.head_size) for one in (r, k, v, taken, put_back, log_w))
        y, ends = run_levels(forest, initial, rows, wkv)
        norm = self.ln_x
        return self.output(y, g, *rows[:3], self.r_k, norm.weight, norm.bias, prepare=self.gated_norm), ends, v_first

    def _low_rank(self, name: str, x: Tensor, before: Tensor, between: Prepare | None = None) -> Tensor:
        inner = product(self.get_parameter(f"{name}1").T, x, before, self.get_parameter(f"x_{name}"), prepare=towards_before)
        return product(self.get_parameter(f"{name}2").T, inner, prepare=between)

    def keys(self, k: Tensor, a: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The key that is written, -kk and kk * a, all [S, H * N]."""
        a0, k_k, k_a = (x.view(-1).to(k.dtype) for x in (a0, k_k, k_a))
        rate = torch.sigmoid(a0 + a)
        kk = F.normalize((k * k_k).view(-1, self.n_head, self.head_size), dim=-1, eps=1e-12).view_as(k)
        return k * (1 + (rate - 1) * k_a), -kk, kk * rate

    def gated_norm(
        self, y: Tensor, g: Tensor, r: Tensor, k: Tensor, v: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:  # fmt: skip
        """Group norm with one group a head, what the token adds of its own, times the gate: y, r, k, v [S, H, N] -> [S, H * N]."""
        bonus = (r * k * r_k.to(r.dtype)).sum(-1, keepdim=True) * v
        return (head_norm(y, weight, bias, self.norm_eps) + bonus.flatten(1)) * g


class ChannelMix(nn.Module):
    """The half of a block that looks at each token, and the one before it, alone."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, shape.n_embd))
        self.key = Linear(shape.n_embd, shape.dim_ffn)
        self.value = Linear(shape.dim_ffn, shape.n_embd)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Rows [S, C] of a forest and the token before each; [S, C]."""
        return self.value(self.key(x, before, self.x_k, prepare=towards_before), prepare=relu_squared)


def _mix_first(v: Tensor, v_first: Tensor, own: Tensor, v0: Tensor) -> tuple[Tensor]:
    return (torch.lerp(v, v_first, torch.sigmoid(v0.view(-1).to(v.dtype) + own)),)


def log_decay(own: Tensor, w0: Tensor) -> Tensor:
    """log w = -exp(-0.5) sigmoid(w0 + own), in fp32 at least."""
    return _LogDecay.apply(own, w0)


class _LogDecay(torch.autograd.Function):
    """Keeps its result alone, which the recurrence keeps too."""

    @staticmethod
    def forward(ctx, own, w0):
        wide = torch.promote_types(own.dtype, torch.float32)
        log_w = (own.to(wide) + w0.view(-1).to(wide)).sigmoid_().mul_(_LEAST_LOG_W)
        ctx.save_for_backward(log_w)
        ctx.type_of_own, ctx.w0 = own.dtype, (w0.dtype, w0.shape)
        return log_w

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (log_w,) = ctx.saved_tensors
        grad = grad * log_w * (1 - log_w / _LEAST_LOG_W)
        dtype, shape = ctx.w0
        return grad.to(ctx.type_of_own), grad.sum(0).view(shape).to(dtype)


def _rank(factor: float) -> Callable[[int], int]:
    return partial(_nearest_rank, factor)


def _nearest_rank(factor: float, n_embd: int) -> int:
    return max(32, round(factor * math.sqrt(n_embd) / 32) * 32)


RANKS = {"att.w1": _rank(2.5), "att.a1": _rank(2.5), "att.v1": _rank(1.7), "att.g1": _rank(5.0)}
MIXES = Mixes("7", TimeMix, ChannelMix, "att.r_k", RANKS)
