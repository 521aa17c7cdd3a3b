"""RWKV-5 ("World", 5.2): time mix with a matrix-valued state and a gate, channel mix with squared relu. Paper: arXiv:2404.05892.

r receptance, k key, v value, g gate, w decay, u bonus of the current token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rwkv_dpo.batches.forest import Forest
from rwkv_dpo.kernels.wkv5 import WKV5
from rwkv_dpo.model.linear import Linear
from rwkv_dpo.model.rwkv import LayerNorm, Mixes, run_levels
from rwkv_dpo.model.shape import ModelShape


class TimeMix(nn.Module):
    """The half of a block that looks back: r, k, v and g of each token and the one before it, and the WKV recurrence."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.n_head, self.head_size = shape.n_head, shape.head_size
        for name in ("time_mix_k", "time_mix_v", "time_mix_r", "time_mix_g"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, shape.n_embd)))
        self.time_decay = nn.Parameter(torch.empty(shape.n_head, shape.head_size))
        self.time_faaaa = nn.Parameter(torch.empty(shape.n_head, shape.head_size))
        self.receptance = Linear(shape.n_embd, shape.dim_att)
        self.key = Linear(shape.n_embd, shape.dim_att)
        self.value = Linear(shape.n_embd, shape.dim_att)
        self.gate = Linear(shape.n_embd, shape.dim_att)
        self.output = Linear(shape.dim_att, shape.n_embd)
        self.ln_x = LayerNorm(shape.dim_att)
        # Dividing the norm's input by head_size_divisor, as RWKV-LM does, is the same as multiplying eps by its square.
        self.norm_eps = 1e-5 * shape.head_size_divisor**2

    def forward(self, x: Tensor, before: Tensor, forest: Forest, initial: Tensor | None, wkv: WKV5) -> tuple[Tensor, Tensor]:
        """x and the tokens before it [S, C] -> out [S, C], WKV states at the segments' ends [n, H, N, N]."""
        r = self.receptance(x, before, self.time_mix_r, prepare=token_mix).view(-1, self.n_head, self.head_size)
        k = self.key(x, before, self.time_mix_k, prepare=token_mix).view_as(r)
        v = self.value(x, before, self.time_mix_v, prepare=token_mix).view_as(r)
        g = self.gate(x, before, self.time_mix_g, prepare=token_mix)

        def recur(r: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, state0: Tensor | None) -> tuple[Tensor, Tensor]:
            return wkv(r, k, v, self.time_decay, self.time_faaaa, cu_seqlens, state0)

        y, ends = run_levels(forest, initial, (r, k, v), recur)
        return self.output(y, g, self.ln_x.weight, self.ln_x.bias, prepare=self.gated_norm), ends

    def gated_norm(self, y: Tensor, g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Group norm with one group a head, times silu(g): y [S, H, N], g [S, H * N] -> [S, H * N]."""
        normed = F.layer_norm(y, y.shape[-1:], eps=self.norm_eps).flatten(1)
        return torch.addcmul(bias.to(y.dtype), normed, weight.to(y.dtype)) * F.silu(g)


class ChannelMix(nn.Module):
    """The half of a block that looks at each token, and the one before it, alone."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, shape.n_embd))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, shape.n_embd))
        self.key = Linear(shape.n_embd, shape.dim_ffn)
        self.receptance = Linear(shape.n_embd, shape.n_embd)
        self.value = Linear(shape.dim_ffn, shape.n_embd)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Rows [S, C] of a forest and the token before each; [S, C]."""
        k = self.key(x, before, self.time_mix_k, prepare=token_mix)
        r = self.receptance(x, before, self.time_mix_r, prepare=token_mix)
        return torch.sigmoid(r) * self.value(k, prepare=relu_squared)


def token_mix(x: Tensor, before: Tensor, mix: Tensor) -> Tensor:
    """mix * x + (1 - mix) * before, channel by channel."""
    return torch.lerp(before, x, mix.view(-1).to(x.dtype))


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0) ** 2, which keeps one tensor for its backward pass."""
    return _ReluSquared.apply(x)


class _ReluSquared(torch.autograd.Function):
    """relu(x) ** 2 in five passes over the widest activation, forward and backward, where autograd takes ten."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        positive = F.relu(x)
        return positive.mul_(positive)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(2).mul_(grad)


MIXES = Mixes(TimeMix, ChannelMix)
