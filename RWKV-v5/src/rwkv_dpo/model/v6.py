"""RWKV-6 ("Finch", x060): RWKV-5 whose token mixes and decays depend on the tokens. Paper: arXiv:2404.05892.

r receptance, k key, v value, g gate, w decay, u bonus of the current token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_dpo.batches.forest import Forest
from rwkv_dpo.kernels.backends import WKV
from rwkv_dpo.kernels.wkv5.common import decay_rate
from rwkv_dpo.model.linear import Linear, product
from rwkv_dpo.model.rwkv import LayerNorm, Mixes, run_levels
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.model.v5 import relu_squared

# The parts of time_maa_w1 and time_maa_w2, in their order.
_MIXES = "wkvrg"


class TimeMix(nn.Module):
    """The half of a block that looks back: r, k, v, g and w of each token and the one before it, and the WKV recurrence."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.n_head, self.head_size = shape.n_head, shape.head_size
        all_mixes, decay_rank = shape.ranks
        for name in "xwkvrg":
            self.register_parameter(f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, shape.n_embd)))
        self.time_maa_w1 = nn.Parameter(torch.empty(shape.n_embd, all_mixes))
        self.time_maa_w2 = nn.Parameter(torch.empty(len(_MIXES), all_mixes // len(_MIXES), shape.n_embd))
        self.time_decay = nn.Parameter(torch.empty(1, 1, shape.dim_att))
        self.time_decay_w1 = nn.Parameter(torch.empty(shape.n_embd, decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(decay_rank, shape.dim_att))
        self.time_faaaa = nn.Parameter(torch.empty(shape.n_head, shape.head_size))
        self.receptance = Linear(shape.n_embd, shape.dim_att)
        self.key = Linear(shape.n_embd, shape.dim_att)
        self.value = Linear(shape.n_embd, shape.dim_att)
        self.gate = Linear(shape.n_embd, shape.dim_att)
        self.output = Linear(shape.dim_att, shape.n_embd)
        self.ln_x = LayerNorm(shape.dim_att)
        # Dividing the norm's input by head_size_divisor, as RWKV-LM does, is the same as multiplying eps by its square.
        self.norm_eps = 1e-5 * shape.head_size_divisor**2

    def forward(
        self, x: Tensor, before: Tensor, forest: Forest, initial: Tensor | None, wkv: WKV, v_first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x and the tokens before it [S, C] -> out [S, C], WKV states at the segments' ends [n, H, N, N]; v_first, which is RWKV-7's, as
        it came."""
        mixes = product(self.time_maa_w1.T, x, before, self.get_parameter("time_maa_x"), prepare=towards_before)
        parts = dict(zip(_MIXES, zip(mixes.chunk(len(_MIXES), dim=1), self.time_maa_w2, strict=True), strict=True))

        def project(name: str, weight: Tensor | Linear) -> Tensor:
            inputs = (x, before, self.get_parameter(f"time_maa_{name}"), *parts[name])
            if isinstance(weight, Linear):
                return weight(*inputs, prepare=token_mix)
            return product(weight, *inputs, prepare=token_mix)

        r, k, v = (self._by_head(project(n, layer)) for n, layer in (("r", self.receptance), ("k", self.key), ("v", self.value)))
        g = project("g", self.gate)
        decay = product(self.time_decay_w2.T, project("w", self.time_decay_w1.T), prepare=torch.tanh)
        log_w = self._by_head(log_decay(decay, self.time_decay))

        def recur(r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, cu_seqlens: Tensor, state0: Tensor | None) -> tuple[Tensor, Tensor]:
            return wkv(r, k, v, log_w, self.time_faaaa, cu_seqlens, state0)

        y, ends = run_levels(forest, initial, (r, k, v, log_w), recur)
        return self.output(y, g, self.ln_x.weight, self.ln_x.bias, prepare=self.gated_norm), ends, v_first

    def gated_norm(self, y: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Group norm with one group a head, times silu(g): y [S, H, N], g [S, H * N] -> [S, H * N]."""
        return head_norm(y, weight, bias, self.norm_eps) * F.silu(g)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(-1, self.n_head, self.head_size)


class ChannelMix(nn.Module):
    """The half of a block that looks at each token, and the one before it, alone."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, shape.n_embd))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, shape.n_embd))
        self.key = Linear(shape.n_embd, shape.dim_ffn)
        self.receptance = Linear(shape.n_embd, shape.n_embd)
        self.value = Linear(shape.dim_ffn, shape.n_embd)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Rows [S, C] of a forest and the token before each; [S, C]."""
        k = self.key(x, before, self.time_maa_k, prepare=towards_before)
        r = self.receptance(x, before, self.time_maa_r, prepare=towards_before)
        return torch.sigmoid(r) * self.value(k, prepare=relu_squared)


def towards_before(x: Tensor, before: Tensor, mix: Tensor) -> Tensor:
    """x + (before - x) * mix, channel by channel."""
    return torch.lerp(x, before, mix.view(-1).to(x.dtype))


def token_mix(x: Tensor, before: Tensor, mix: Tensor, own: Tensor, matrix: Tensor) -> Tensor:
    """The same, with each token's tanh(own [S, m]) @ matrix [m, C] added to mix."""
    return torch.lerp(x, before, torch.addmm(mix.view(1, -1).to(x.dtype), torch.tanh(own), matrix.to(x.dtype)))


def head_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm with one group a head: y [S, H, N] -> [S, H * N]."""
    normed = F.layer_norm(y, y.shape[-1:], eps=eps).flatten(1)
    return torch.addcmul(bias.to(y.dtype), normed, weight.to(y.dtype))


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
