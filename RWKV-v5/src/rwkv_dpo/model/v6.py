"""RWKV-6 ("Finch", x060): RWKV-5 whose token mixes and decays depend on the tokens. Paper: arXiv:2404.05892.

r receptance, k key, v value, g gate, w decay, u bonus of the current token.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_dpo.batches.forest import Forest
from rwkv_dpo.kernels.backends import WKV
from rwkv_dpo.kernels.fused import implementation
from rwkv_dpo.kernels.wkv5.reference import decay_rate
from rwkv_dpo.model import v5
from rwkv_dpo.model.halves import TANH, Entry, GatedNorm, Gradients, LookingBack
from rwkv_dpo.model.in_place_of_layers import Rows
from rwkv_dpo.model.linear import Matrix, products
from rwkv_dpo.model.rwkv import LayerNorm, Mixes, run_forest
from rwkv_dpo.model.shape import ModelShape

# The parts of time_maa_w1 and time_maa_w2, in their order.
_MIXES = "wkvrg"


class TimeMix(LookingBack):
    """The half of a block that looks back: r, k, v, g and w of each token and the one before it, and the WKV recurrence."""

    time_maa_x: nn.Parameter

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__(shape)
        all_mixes, decay_rank = shape.ranks
        for name in "xwkvrg":
            self.register_parameter(f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, shape.n_embd)))
        self.time_maa_w1 = nn.Parameter(torch.empty(shape.n_embd, all_mixes))
        self.time_maa_w2 = nn.Parameter(torch.empty(len(_MIXES), all_mixes // len(_MIXES), shape.n_embd))
        self.time_decay = nn.Parameter(torch.empty(1, 1, shape.dim_att))
        self.time_decay_w1 = nn.Parameter(torch.empty(shape.n_embd, decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(decay_rank, shape.dim_att))
        self.time_faaaa = nn.Parameter(torch.empty(shape.n_head, shape.head_size))
        self.matrices = {name: Matrix(self, name) for name in ("time_maa_w1", "time_decay_w1", "time_decay_w2")}
        self.add_projections(shape, "receptance", "key", "value", "gate")

    def forward(
        self, x: Tensor, norm: LayerNorm, forest: Forest, before: Tensor | None, initial: Tensor | None, wkv: WKV,
        v_first: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """As RWKV-5's."""
        # Rows, the rows before them, and what decides how far each token mixes the two.
        zero = torch.zeros_like(norm.bias)
        inputs = (x, before, norm.weight, norm.bias, zero, zero + 1, self.time_maa_x)
        (own, of_before, depths), (last, x) = products(Entry(forest, True), inputs, (Rows(), Rows(), self.matrices["time_maa_w1"]))
        mixing = tuple(getattr(self, f"time_maa_{name}") for name in _MIXES)
        layers = (self.matrices["time_decay_w1"], self.key, self.value, self.receptance, self.gate)
        (w, k, v, r, g), _ = products(TokenMixes(), (own, of_before, depths, self.time_maa_w2, *mixing), layers)
        (w,), _ = products(TANH, (w,), [self.matrices["time_decay_w2"]])

        rows = tuple(part.view(-1, self.n_head, self.head_size) for part in (r, k, v, log_decay(w, self.time_decay)))
        y, ends = run_forest(wkv, forest, initial, rows, (self.time_faaaa,))
        (out,), _ = products(GatedNorm(self.norm_eps), (y, g, self.ln_x.weight, self.ln_x.bias), [self.output])
        return x + out, last, ends, v_first


class ChannelMix(v5.ChannelMix):
    """RWKV-5's, whose mixes are told by the token before."""

    mixes, of_before = ("time_maa_k", "time_maa_r"), True


class TokenMixes:
    """own + (before - own) * (mixing + tanh(depths) @ matrix) for each of M mixes. Inputs: own, before [S, C], depths [S, M * m], matrices
    [M, m, C], and a vector a mix."""

    def make(self, *inputs: Any) -> tuple[Any, tuple[Tensor, ...]]:
        """See Preparation."""
        own, before, depths, matrices, *mixing = inputs
        adds = torch.bmm(_parts(torch.tanh(depths), len(mixing)), matrices.to(own.dtype))
        return implementation(own).token_mixes(own, before, adds, mixing).unbind(), ()

    def gradients(self, inputs: Gradients, g_prepared: Gradients, g_others: Gradients) -> Gradients:
        """See Preparation."""
        own, before, depths, matrices, *mixing = (x for x in inputs if x is not None)
        opened, narrow = torch.tanh(depths), matrices.to(own.dtype)
        parts = _parts(opened, len(mixing))
        g_own, g_before, g_adds, *g_mixing = implementation(own).token_mixes_gradients(
            own, before, torch.bmm(parts, narrow), mixing, g_prepared
        )
        g_parts = torch.bmm(g_adds, narrow.transpose(1, 2)).transpose(0, 1).reshape(depths.shape)
        g_matrices = torch.bmm(parts.transpose(1, 2), g_adds).to(matrices.dtype)
        return g_own, g_before, torch.ops.aten.tanh_backward(g_parts, opened), g_matrices, *g_mixing


def _parts(x: Tensor, n: int) -> Tensor:
    """Rows [S, n * m] as [n, S, m]."""
    return x.view(len(x), n, x.shape[1] // n).transpose(0, 1)


def log_decay(decay: Tensor, base: Tensor) -> Tensor:
    """log w = -exp(base + decay), in fp32 at least."""
    return _LogDecay.apply(decay, base)


class _LogDecay(torch.autograd.Function):
    """Keeps its result alone, which the recurrence keeps too."""

    @staticmethod
    def forward(ctx, decay, base):
        wide = torch.promote_types(decay.dtype, torch.float32)
        log_w = decay_rate(decay.to(wide) + base.view(-1).to(wide)).neg_()
        ctx.save_for_backward(log_w)
        ctx.type_of_decay, ctx.base = decay.dtype, (base.dtype, base.shape)
        return log_w

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (log_w,) = ctx.saved_tensors
        # It is its own derivative.
        grad = grad * log_w
        dtype, shape = ctx.base
        return grad.to(ctx.type_of_decay), grad.sum(0).view(shape).to(dtype)


def _rank_of_mixes(n_embd: int) -> int:
    return 5 * (64 if n_embd >= 4096 else 32)


def _rank_of_decay(n_embd: int) -> int:
    return 128 if n_embd >= 4096 else 64


MIXES = Mixes("6", TimeMix, ChannelMix, "att.time_faaaa", {"att.time_maa_w1": _rank_of_mixes, "att.time_decay_w1": _rank_of_decay})
