"""The stack every RWKV version shares: embedding, blocks of time mix and channel mix, head. Versions differ in the mixes."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_dpo.batches.forest import Forest, LayerState
from rwkv_dpo.kernels.backends import WKV
from rwkv_dpo.kernels.linear_logprobs import LEAN, Scores, linear_logprobs
from rwkv_dpo.model.linear import Cast, casting, casts_in
from rwkv_dpo.model.shape import ModelShape


class Mixes(NamedTuple):
    """The two halves of a block, for one model version, and what of their shapes can't be told from the projections."""

    version: str
    time_mix: Callable[[ModelShape, int], nn.Module]  # constructors (shape, layer)
    channel_mix: Callable[[ModelShape, int], nn.Module]
    of_heads: str  # a block's weight whose last dimension is the head size
    ranks: Mapping[str, Callable[[int], int]] = {}  # weights whose second dimension is a rank; a new model's, by n_embd


class RWKV(nn.Module):
    """Parameters carry the official names, so that a state dict is an official checkpoint."""

    def __init__(
        self, shape: ModelShape, mixes: Mixes, wkv: WKV, compute_dtype: torch.dtype, grad_cp: str = "0", dropout: float = 0.0
    ) -> None:
        """compute_dtype: of activations and matrix products; the weights keep their own (fp32 in training).
        grad_cp: what the backward pass computes again: "0" and "selective" norms, mixes and gates, "1" whole blocks."""
        super().__init__()
        self.shape, self.wkv, self.compute_dtype, self.grad_cp = shape, wkv, compute_dtype, grad_cp
        self.finds_collisions = False  # whether scored rows come with LogProbs.collisions
        self.emb = nn.Embedding(shape.vocab_size, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape, mixes, layer, dropout) for layer in range(shape.n_layer))
        self.ln_out = LayerNorm(shape.n_embd)
        self.head = Head(shape.n_embd, shape.vocab_size)
        for cast in casts_in(self):
            cast.keeps_cast = not self.is_lean

    @property
    def is_lean(self) -> bool:
        """Memory matters more than time."""
        return self.grad_cp == "1"

    def forward(self, forest: Forest, initial: list[LayerState] | None = None) -> tuple[Tensor, list[LayerState]]:
        """Hidden rows [S, C] after the last norm, and every layer's state at the end of each of the n segments.

        initial: what the roots continue from, n_roots rows in each tensor; None for the beginning of time, which is the zero
        state or, where the model has them, its tuned states.
        Logits are `head(hidden)`; in training, `head(hidden, targets)` never makes them all.
        """
        x = self.emb(forest.tokens).to(self.compute_dtype)
        initial = self.first_states(forest.n_roots) if initial is None else initial
        v_first, states = None, []
        for layer, block in enumerate(self.blocks):
            arguments = (x, forest, initial[layer] if initial else None, self.wkv, v_first)
            if self.grad_cp == "1" and torch.is_grad_enabled():
                x, state, v_first = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, state, v_first = block(*arguments)
            states.append(state)
        return self.ln_out(x), states

    def add_time_states(self) -> list[nn.Parameter]:
        """`blocks.N.att.time_state` of every layer, zero where it had none."""
        shape, states = self.shape, []
        for block in self.blocks:
            att = block.get_submodule("att")
            if not hasattr(att, "time_state"):
                zero = torch.zeros(shape.n_head, shape.head_size, shape.head_size, device=self.ln_out.weight.device)
                att.register_parameter("time_state", nn.Parameter(zero))
            states.append(att.get_parameter("time_state"))
        return states

    def first_states(self, n_roots: int) -> list[LayerState] | None:
        """The tuned states (`blocks.N.att.time_state`, [H, value, key] as files have them) that roots begin from; None: zero."""
        tuned = [state for block in self.blocks if (state := getattr(block.att, "time_state", None)) is not None]
        if not tuned:
            return None
        before = torch.zeros(n_roots, self.shape.n_embd, dtype=self.compute_dtype, device=tuned[0].device)
        return [LayerState(before, state.transpose(1, 2).expand(n_roots, -1, -1, -1), before) for state in tuned]


class Head(nn.Module, Cast):
    """The matrix from hidden rows to logits."""

    def __init__(self, n_embd: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, n_embd))

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, lean: bool = False, collisions: bool = False
    ) -> Tensor | Scores:
        """Logits of hidden rows [R, C], or with targets [R] their log-probabilities, which never makes all the logits; lean: with
        the least memory; collisions: with LogProbs.collisions. Both in one forward: DeepSpeed's ZeRO-3 gathers a module's weights for
        its forward only."""
        if targets is None:
            return F.linear(hidden, self.weight.to(hidden.dtype))
        cast = self.cast(hidden.dtype)
        return linear_logprobs(hidden, self.weight, targets, cast=cast, collisions=collisions, **(LEAN if lean else {}))


class Block(nn.Module):
    """Autograd keeps 12.5 values per token and channel of an RWKV-5 block with dim_ffn = 3.5 n_embd: both halves' inputs (2), r, k, v,
    g, y (5), and the channel mix's key (3.5), gate and value (2)."""

    def __init__(self, shape: ModelShape, mixes: Mixes, layer: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self._casts: tuple[Cast, ...] | None = None
        if layer == 0:
            self.ln0 = LayerNorm(shape.n_embd)
        self.ln1 = LayerNorm(shape.n_embd)
        self.ln2 = LayerNorm(shape.n_embd)
        self.att = mixes.time_mix(shape, layer)
        self.ffn = mixes.channel_mix(shape, layer)

    def forward(
        self, x: Tensor, forest: Forest, initial: LayerState | None, wkv: WKV, v_first: Tensor | None
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        """Rows [S, C] after the block, what its segments remember at their ends, and v_first for the next block. initial: what the roots
        begin from. v_first: in RWKV-7 the first block's values [S, C], None before it and in other versions."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        with casting(self._all_casts(), x.dtype):
            return self._halves(x, forest, initial, wkv, v_first)

    def _halves(
        self, x: Tensor, forest: Forest, initial: LayerState | None, wkv: WKV, v_first: Tensor | None
    ) -> tuple[Tensor, LayerState, Tensor | None]:
        att_shift, wkv_start, ffn_shift = initial or (None, None, None)
        x, att_last, wkv_ends, v_first = self.att(x, self.ln1, forest, _as(x, att_shift), wkv_start, wkv, v_first)
        x, ffn_last = self.ffn(self._drop(x), self.ln2, forest, _as(x, ffn_shift))
        return self._drop(x), LayerState(att_last, wkv_ends, ffn_last), v_first

    def _all_casts(self) -> tuple[Cast, ...]:
        """Found once: adapters come before the first call, and leave their base layers in place."""
        if self._casts is None:
            self._casts = tuple(casts_in(self))
        return self._casts

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class LayerNorm(nn.Module):
    """Over the last dimension, in the dtype of x with fp32 statistics."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normed rows, in the dtype of x."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype))


def _as(x: Tensor, handed_in: Tensor | None) -> Tensor | None:
    return None if handed_in is None else handed_in.to(x.dtype)


def run_forest(
    wkv: WKV, forest: Forest, initial: Tensor | None, inputs: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """A recurrence over inputs [S, ...], children from the end states of their parents: y [S, ...] and ends [n, ...]."""
    if of_forest := getattr(wkv, "of_forest", None):
        return of_forest(*inputs, *parameters, forest.cu_seqlens, forest.parents if len(forest.levels) > 1 else None, initial)
    ys: list[Tensor] = []
    ends: list[Tensor] = []
    # A split's backward is one concatenation, where slices would each make a gradient of all rows.
    parts = zip(*(x.split([level.end - level.start for level in forest.levels]) for x in inputs), strict=True)
    for level, rows in zip(forest.levels, parts, strict=True):
        state0 = initial if level.parents is None else torch.cat(ends).index_select(0, level.parents)
        y, end = wkv(*rows, *parameters, level.cu_seqlens, state0)
        ys.append(y)
        ends.append(end)
    return (ys[0], ends[0]) if len(ys) == 1 else (torch.cat(ys), torch.cat(ends))
