"""A micro-batch in chunks of tokens: the exact gradient in the memory of one chunk and of the states at the borders.

Segments are cut into pieces, and pieces that don't depend on one another share a chunk. A first pass walks the chunks in order,
yields what every scored row scores, and stores the states at the borders. The loss turns these into one gradient a row; the
backward pass walks the chunks from last to first, computes each again from its stored state, and hands the gradient of that
state to the chunk before. To everyone else this is one differentiable function of the trainable parameters.

Between two chunks lie the live states: the ends of pieces that later pieces continue from. A long window has one, a pair up to two.
"""

import math
from bisect import insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from rwkv_dpo.forest import Forest, ForestBuilder, LayerState, Step
from rwkv_dpo.linear_logprobs import LogProbs
from rwkv_dpo.model.rwkv import RWKV

# Up to so many borders keep their states. Beyond, only every sqrt(n)-th does, and the backward pass computes those between once
# more: 2 sqrt(n) states instead of n, for one more forward pass (without the head).
DIRECT_BORDERS = 32

Live = list[LayerState]


@dataclass(frozen=True)
class Chunk:
    """Pieces of segments that run in one model call, all of them beginning (sources is None) or all of them continuing."""

    forest: Forest  # every piece is a root
    sources: Tensor | None  # int64 [pieces], which of the live states each piece continues
    keep: Tensor  # int64, what lives on: numbers into the live states before the chunk, followed by the pieces' ends
    rows: Tensor  # int64 [r], rows of the forest that score
    targets: Tensor  # int64 [r]
    places: Tensor  # int64 [r], where among the step's scored rows each of them belongs

    def to(self, device: torch.device) -> "Chunk":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("keep", "rows", "targets", "places")}
        sources = None if self.sources is None else self.sources.to(device, non_blocking=True)
        return replace(self, forest=self.forest.to(device), sources=sources, **moved)


class _Piece(NamedTuple):
    start: int  # rows start..end-1 of the step's forest
    end: int
    before: int  # the piece whose end it continues, -1 for none


def plan_chunks(step: Step, size: int) -> tuple[Chunk, ...]:
    """Cuts a step (on the CPU) into chunks of at most `size` tokens."""
    pieces = _cut(step.forest, size)
    waiting = [0] * len(pieces)
    for piece in pieces:
        if piece.before >= 0:
            waiting[piece.before] += 1
    tokens = step.forest.tokens.numpy()
    groups = list(_group(pieces, size))
    chunks: list[Chunk] = []
    live: list[int] = []
    for group, (rows, places) in zip(groups, _rows_of(groups, pieces, step), strict=True):
        builder = ForestBuilder()
        for i in group:
            builder.add(tokens[pieces[i].start : pieces[i].end])
        begins = pieces[group[0]].before < 0
        sources = None if begins else torch.tensor([live.index(pieces[i].before) for i in group])
        for i in group if not begins else ():
            waiting[pieces[i].before] -= 1
        candidates = [*live, *group]
        keep = [n for n, i in enumerate(candidates) if waiting[i]]
        live = [candidates[n] for n in keep]
        chunks.append(Chunk(builder.build()[0], sources, torch.tensor(keep, dtype=torch.int64), rows, step.targets[places], places))
    return tuple(chunks)


def _cut(forest: Forest, size: int) -> list[_Piece]:
    """Pieces in depth-first order, so that few states live at a time. Empty segments have none: what continues them continues
    their parent."""
    segments: list[tuple[int, int]] = []
    children: dict[int, list[int]] = {}
    for level in forest.levels:
        bounds = (level.cu_seqlens + level.start).tolist()
        parents = [-1] * (level.last - level.first) if level.parents is None else level.parents.tolist()
        for (start, end), parent in zip(pairwise(bounds), parents, strict=True):
            children.setdefault(parent, []).append(len(segments))
            segments.append((start, end))
    pieces: list[_Piece] = []
    pending = [(segment, -1) for segment in reversed(children[-1])]
    while pending:
        segment, before = pending.pop()
        start, end = segments[segment]
        for first in range(start, end, size):
            pieces.append(_Piece(first, min(first + size, end), before))
            before = len(pieces) - 1
        pending += [(child, before) for child in reversed(children.get(segment, []))]
    return pieces


def _group(pieces: list[_Piece], size: int) -> Iterator[list[int]]:
    """Which pieces share a chunk, chunk by chunk: the earliest that can run, and others of its kind that fit beside it."""
    followers: dict[int, list[int]] = {}
    for i, piece in enumerate(pieces):
        followers.setdefault(piece.before, []).append(i)
    ready = followers.get(-1, [])
    while ready:
        begins, room, group = pieces[ready[0]].before < 0, size, []
        for i in ready:
            n_tokens = pieces[i].end - pieces[i].start
            if (pieces[i].before < 0) == begins and n_tokens <= room:
                group.append(i)
                room -= n_tokens
            if not room:
                break
        taken = set(group)
        ready = [i for i in ready if i not in taken]
        for i in group:
            for follower in followers.get(i, ()):
                insort(ready, follower)
        yield group


def _rows_of(groups: list[list[int]], pieces: list[_Piece], step: Step) -> Iterator[tuple[Tensor, Tensor]]:
    """For each chunk the rows that score, counted from its first row, and their places among the step's scored rows."""
    n_rows = step.forest.tokens.numel()
    chunk_of, row_in_chunk = np.zeros(n_rows, dtype=np.int64), np.zeros(n_rows, dtype=np.int64)
    for number, group in enumerate(groups):
        first = 0
        for i in group:
            start, end, _ = pieces[i]
            chunk_of[start:end] = number
            row_in_chunk[start:end] = np.arange(first, first + end - start)
            first += end - start
    scored = step.scored_rows.numpy()
    order = np.argsort(chunk_of[scored], kind="stable")
    bounds = np.searchsorted(chunk_of[scored][order], np.arange(len(groups) + 1))
    for start, end in pairwise(bounds):
        places = order[start:end]
        yield torch.from_numpy(row_in_chunk[scored[places]]), torch.from_numpy(places)


def score_chunks(model: RWKV, chunks: tuple[Chunk, ...], n_rows: int) -> LogProbs:
    """What `objective.score_rows` returns for the step's n_rows scored rows, in the memory of one chunk. Differentiable in the
    parameters that require a gradient; with gradients off it is the first pass alone."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if torch.is_grad_enabled() and trainable:
        return LogProbs(*_ScoreChunks.apply(model, chunks, n_rows, list(trainable), *trainable.values()))
    with torch.no_grad():
        return _first_pass(model, chunks, n_rows, lambda number, live: None)


class _ScoreChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, model, chunks, n_rows, names, *parameters):
        stride = 1 if len(chunks) <= DIRECT_BORDERS else math.isqrt(len(chunks) - 1) + 1
        ctx.model, ctx.chunks, ctx.stride, ctx.names = model, chunks, stride, names
        ctx.stored, ctx.draws = [], []

        def at_border(number: int, live: Live) -> None:
            ctx.draws.append(_random_state(model))
            if number % stride == 0:
                ctx.stored.append(live)

        return _first_pass(model, chunks, n_rows, at_border)

    @staticmethod
    @once_differentiable
    def backward(ctx, *row_grads):
        parameters = dict(ctx.model.named_parameters())
        # Gradients gather in stand-ins that share the parameters' memory: the parameters' own would meet hooks (DDP, DeepSpeed)
        # once a chunk. They leave through this function's result, once.
        leaves = {name: parameters[name].detach().requires_grad_() for name in ctx.names}

        def walk_back() -> None:
            after: list[Tensor | None] = []
            for first in reversed(range(0, len(ctx.chunks), ctx.stride)):
                group = ctx.chunks[first : first + ctx.stride]
                draws = ctx.draws[first : first + ctx.stride]
                lives = [ctx.stored.pop()]
                with torch.no_grad():
                    for chunk, draw in zip(group[:-1], draws, strict=False):
                        with _drawing_again(ctx.model, draw):
                            lives.append(_advance(ctx.model, chunk, lives[-1])[1])
                for chunk, draw in zip(reversed(group), reversed(draws), strict=True):
                    with _drawing_again(ctx.model, draw):
                        after = _step_back(ctx.model, chunk, lives.pop(), row_grads, after)

        functional_call(_With(ctx.model), {f"model.{name}": leaf for name, leaf in leaves.items()}, (walk_back,))
        return None, None, None, None, *(leaf.grad for leaf in leaves.values())


class _With(nn.Module):
    """Runs work with whatever stands in for the model's parameters, its inner backward passes included."""

    def __init__(self, model: RWKV) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[], None]) -> None:
        work()


def _first_pass(model: RWKV, chunks: tuple[Chunk, ...], n_rows: int, at_border: Callable[[int, Live], None]) -> LogProbs:
    """at_border(number, live) is called before each chunk."""
    wide = torch.promote_types(model.compute_dtype, torch.float32)
    result = LogProbs(*(torch.empty(n_rows, dtype=wide, device=model.head.weight.device) for _ in LogProbs._fields))
    live: Live = []
    for number, chunk in enumerate(chunks):
        at_border(number, live)
        hidden, live = _advance(model, chunk, live)
        if chunk.places.numel():
            for whole, part in zip(result, _score(model, chunk, hidden), strict=True):
                whole[chunk.places] = part
    return result


def _advance(model: RWKV, chunk: Chunk, live: Live) -> tuple[Tensor, Live]:
    """Hidden rows of the chunk, and the states that live after it."""
    initial = None if chunk.sources is None else [_select(layer, chunk.sources) for layer in live]
    hidden, ends = model(chunk.forest, initial)
    if not chunk.keep.numel():
        return hidden, []
    if live:
        ends = [LayerState(*map(torch.cat, zip(*layers, strict=True))) for layers in zip(live, ends, strict=True)]
    return hidden, [_select(layer, chunk.keep) for layer in ends]


def _select(states: LayerState, numbers: Tensor) -> LayerState:
    return LayerState(*(part.index_select(0, numbers) for part in states))


def _score(model: RWKV, chunk: Chunk, hidden: Tensor) -> LogProbs:
    return model.head(hidden.index_select(0, chunk.rows), chunk.targets, lean=model.is_lean)


def _step_back(model: RWKV, chunk: Chunk, live: Live, row_grads: tuple[Tensor, ...], after: list[Tensor | None]) -> list[Tensor | None]:
    """Adds a chunk's share to the parameters' gradients. `after`: gradients of the states that live after it; returns those of
    the states before it, both as flat lists over layers."""
    with torch.enable_grad():
        live = [LayerState(*(part.detach().requires_grad_() for part in layer)) for layer in live]
        hidden, ends = _advance(model, chunk, live)
        outputs = [part for layer in ends for part in layer]
        grads = list(after)
        if chunk.places.numel():
            outputs += _score(model, chunk, hidden)
            grads += [grad.index_select(0, chunk.places) for grad in row_grads]
        del hidden, ends
    wanted = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad and g is not None]
    del outputs
    if wanted:
        torch.autograd.backward([o for o, _ in wanted], [g for _, g in wanted])
    return [part.grad for layer in live for part in layer]


def _random_state(model: RWKV) -> dict[str, Tensor]:
    """Of the generators that dropout draws from."""
    device = model.head.weight.device
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


@contextmanager
def _drawing_again(model: RWKV, state: dict[str, Tensor]) -> Iterator[None]:
    """What is drawn within was drawn when `state` was taken; afterwards the generators go on as if nothing had been."""
    device = model.head.weight.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state["cpu"])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], device)
        yield
