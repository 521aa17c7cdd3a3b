"""RWKV-5 ("World", 5.2): time mix with a matrix-valued state and a gate, channel mix with squared relu. Paper: arXiv:2404.05892.

r receptance, k key, v value, g gate, w decay, u bonus of the current token.
"""

import torch
from torch import Tensor, nn

from rwkv_dpo.batches.forest import Forest
from rwkv_dpo.kernels.backends import WKV
from rwkv_dpo.model.halves import Entry, GatedNorm, LookingBack, ReluSquared, fused
from rwkv_dpo.model.linear import Linear, products
from rwkv_dpo.model.rwkv import LayerNorm, Mixes, run_forest
from rwkv_dpo.model.shape import ModelShape


class TimeMix(LookingBack):
    """The half of a block that looks back: r, k, v and g of each token and the one before it, and the WKV recurrence."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__(shape)
        for name in ("time_mix_k", "time_mix_v", "time_mix_r", "time_mix_g"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, shape.n_embd)))
        self.time_decay = nn.Parameter(torch.empty(shape.n_head, shape.head_size))
        self.time_faaaa = nn.Parameter(torch.empty(shape.n_head, shape.head_size))
        self.add_projections(shape, "receptance", "key", "value", "gate")

    def forward(
        self, x: Tensor, norm: LayerNorm, forest: Forest, before: Tensor | None, initial: Tensor | None, wkv: WKV,
        v_first: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Rows x [S, C] of the residual stream and the norm that they enter by -> the stream after the half [S, C], the norm's output at
        the segments' ends [n, C], WKV states there [n, H, N, N], and v_first, which is RWKV-7's, as it came. before, initial: what the
        roots were handed of the second and third."""
        mixing = (getattr(self, f"time_mix_{name}") for name in "rkvg")
        layers = (self.receptance, self.key, self.value, self.gate)
        (*rkv, g), (last, x) = products(Entry(forest), (x, before, norm.weight, norm.bias, *mixing), layers)
        r, k, v = (part.view(-1, self.n_head, self.head_size) for part in rkv)

        y, ends = run_forest(wkv, forest, initial, (r, k, v), (self.time_decay, self.time_faaaa))
        (out,), _ = products(GatedNorm(self.norm_eps), (y, g, self.ln_x.weight, self.ln_x.bias), [self.output])
        return x + out, last, ends, v_first


class ChannelMix(nn.Module):
    """The half of a block that looks at each token, and the one before it, alone."""

    # Of key and receptance, and whether they say how much of the token before there is.
    mixes, of_before = ("time_mix_k", "time_mix_r"), False

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        for name in self.mixes:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, shape.n_embd)))
        self.key = Linear(shape.n_embd, shape.dim_ffn)
        self.receptance = Linear(shape.n_embd, shape.n_embd)
        self.value = Linear(shape.dim_ffn, shape.n_embd)

    def forward(self, x: Tensor, norm: LayerNorm, forest: Forest, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows x [S, C] of the residual stream and the norm that they enter by -> the stream after the half [S, C], the norm's output at
        the segments' ends [n, C]. before: what the roots were handed of it."""
        inputs = (x, before, norm.weight, norm.bias, *(getattr(self, name) for name in self.mixes))
        (k, r), (last, x) = products(Entry(forest, self.of_before), inputs, (self.key, self.receptance))
        (value,), _ = products(ReluSquared(), (k,), [self.value])
        return x + fused("sigmoid_gate", r, value), last


MIXES = Mixes("5", TimeMix, ChannelMix, "att.time_decay")
