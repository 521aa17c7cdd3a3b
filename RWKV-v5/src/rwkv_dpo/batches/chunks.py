"""A step cut into chunks of tokens, so that it can run in the memory of one.

Segments are cut into pieces, and pieces that don't depend on one another share a chunk. Between two chunks lie the live states:
the ends of pieces that later pieces continue from. A long window has one, a pair up to two.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_dpo.batches.forest import Forest, ForestBuilder
from rwkv_dpo.batches.step import Step


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
        """On another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("keep", "rows", "targets", "places")}
        sources = None if self.sources is None else self.sources.to(device, non_blocking=True)
        return replace(self, forest=self.forest.to(device), sources=sources, **moved)


@dataclass(frozen=True)
class ChunkPlan:
    """A step in chunks. Of a truncated one the first n_window_chunks hold windows and the others pairs; else they may share."""

    chunks: tuple[Chunk, ...]
    n_rows: int  # scored rows of the step
    truncated: bool
    n_window_chunks: int

    def to(self, device: torch.device) -> "ChunkPlan":
        """On another device."""
        return replace(self, chunks=tuple(chunk.to(device) for chunk in self.chunks))


class _Piece(NamedTuple):
    start: int  # rows start..end-1 of the step's forest
    end: int
    before: int  # the piece whose end it continues, -1 for none
    kind: int  # pieces of one kind may share a chunk


def plan_chunks(step: Step, size: int, truncated: bool = False) -> ChunkPlan:
    """Cuts a step (on the CPU) into chunks of at most `size` tokens."""
    is_window = np.zeros(step.forest.tokens.numel(), dtype=bool)
    is_window[step.scored_rows[: step.n_window_rows].numpy()] = truncated
    pieces = _cut(step.forest, size, is_window)
    waiting = [0] * len(pieces)
    for piece in pieces:
        if piece.before >= 0:
            waiting[piece.before] += 1
    tokens = step.forest.tokens.numpy()
    groups = list(_group(pieces, size))
    n_window_chunks = sum(bool(is_window[pieces[group[0]].start]) for group in groups)
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
    return ChunkPlan(tuple(chunks), step.scored_rows.numel(), truncated, n_window_chunks)


def _cut(forest: Forest, size: int, is_window: np.ndarray) -> list[_Piece]:
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
            pieces.append(_Piece(first, min(first + size, end), before, 2 * (before < 0) + is_window[first]))
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
        kind, room, group = pieces[ready[0]].kind, size, []
        for i in ready:
            n_tokens = pieces[i].end - pieces[i].start
            if pieces[i].kind == kind and n_tokens <= room:
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
            start, end, *_ = pieces[i]
            chunk_of[start:end] = number
            row_in_chunk[start:end] = np.arange(first, first + end - start)
            first += end - start
    scored = step.scored_rows.numpy()
    order = np.argsort(chunk_of[scored], kind="stable")
    bounds = np.searchsorted(chunk_of[scored][order], np.arange(len(groups) + 1))
    for start, end in pairwise(bounds):
        places = order[start:end]
        yield torch.from_numpy(row_in_chunk[scored[places]]), torch.from_numpy(places)
