"""A batch as a forest of token segments: nothing padded, nothing computed twice.

A segment starts where its parent ended: a root from nothing (or from a state handed in), a child from the state that its
parent reached. A corpus window is a root; a preference pair is a root (the trunk that both answers share) with a child for
each answer's remainder. Segments stand level by level: all roots, then all children of roots, and so on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_dpo.data.pairs import Pair


class LayerState(NamedTuple):
    """What n segments remember at their ends, in one layer."""

    att_shift: Tensor  # [n, C] the last token's input to the time mix
    wkv: Tensor  # [n, H, N, N] fp32 (float64 in float64 runs)
    ffn_shift: Tensor  # [n, C] the last token's input to the channel mix


class Level(NamedTuple):
    """Segments first..last-1, which hold rows start..end-1. All their parents lie in earlier levels."""

    first: int
    last: int
    start: int
    end: int
    cu_seqlens: Tensor  # int32 [last - first + 1] on the CPU, counted from the level's first row
    parents: Tensor | None  # int64 [last - first] on the device; None for the roots


@dataclass(frozen=True)
class Forest:
    """n segments over S tokens; `n_roots` of them are roots. Make one with ForestBuilder.

    Rows are numbered 0..S-1; a row number S + i stands for the token before root i (zero, or a handed-in state).
    """

    tokens: Tensor  # int64 [S]
    levels: tuple[Level, ...]
    first_rows: Tensor  # int64 [m], the first row of each segment that isn't empty
    before_first: Tensor  # int64 [m], the row whose token comes before it
    last_rows: Tensor  # int64 [n], the row of each segment's last token (an empty one's: what its parent ended with)

    @property
    def n_segments(self) -> int:
        return self.last_rows.numel()

    @property
    def n_roots(self) -> int:
        return self.levels[0].last

    def to(self, device: torch.device) -> "Forest":
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        levels = tuple(level._replace(parents=None if level.parents is None else move(level.parents)) for level in self.levels)
        return replace(
            self,
            tokens=move(self.tokens),
            levels=levels,
            first_rows=move(self.first_rows),
            before_first=move(self.before_first),
            last_rows=move(self.last_rows),
        )


class ForestBuilder:
    """Collects segments in any order; parents before children."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._parents: list[int] = []
        self._depths: list[int] = []

    def add(self, tokens: Sequence[int] | np.ndarray, parent: int = -1) -> int:
        """Adds a segment (it may be empty) that continues segment `parent`, or a root for -1. Returns its handle."""
        if not -1 <= parent < len(self._parents):
            raise IndexError(f"segment {len(self._parents)} names parent {parent}, which hasn't been added")
        self._tokens.append(np.asarray(tokens, dtype=np.int64))
        self._parents.append(parent)
        self._depths.append(0 if parent == -1 else self._depths[parent] + 1)
        return len(self._parents) - 1

    def build(self) -> tuple[Forest, list[int]]:
        """The forest, and for each handle the row at which its segment starts."""
        n = len(self._parents)
        if n == 0:
            raise ValueError("a forest needs at least one segment")
        order = sorted(range(n), key=lambda handle: self._depths[handle])  # stable: siblings stay in the order added
        place = {handle: i for i, handle in enumerate(order)}
        parents = [place.get(self._parents[handle], -1) for handle in order]
        lengths = [self._tokens[handle].size for handle in order]
        starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        n_rows = starts[-1]

        before = [n_rows + i if parent == -1 else -1 for i, parent in enumerate(parents)]
        last_rows: list[int] = []
        for i, parent in enumerate(parents):
            if parent != -1:
                before[i] = last_rows[parent]
            last_rows.append(starts[i + 1] - 1 if lengths[i] else before[i])

        filled = [i for i in range(n) if lengths[i]]
        forest = Forest(
            tokens=torch.from_numpy(np.concatenate([self._tokens[handle] for handle in order])),
            levels=tuple(self._levels(order, parents, starts)),
            first_rows=torch.tensor([starts[i] for i in filled], dtype=torch.int64),
            before_first=torch.tensor([before[i] for i in filled], dtype=torch.int64),
            last_rows=torch.tensor(last_rows, dtype=torch.int64),
        )
        return forest, [starts[place[handle]] for handle in range(n)]

    def _levels(self, order: list[int], parents: list[int], starts: list[int]):
        depths = [self._depths[handle] for handle in order]
        for depth in range(depths[-1] + 1):
            first, last = depths.index(depth), len(depths) - depths[::-1].index(depth)
            yield Level(
                first,
                last,
                starts[first],
                starts[last],
                cu_seqlens=torch.tensor(starts[first : last + 1], dtype=torch.int32) - starts[first],
                parents=None if depth == 0 else torch.tensor(parents[first:last], dtype=torch.int64),
            )


@dataclass(frozen=True)
class Step:
    """One micro-batch: corpus windows and preference pairs as a forest, and which rows score what.

    Scored rows come windows first. A row before which answers haven't parted counts for all of them, so sequence
    log-probabilities are sums over (entry_rows, entry_answers): scored row entry_rows[e] counts towards answer
    entry_answers[e]. Answers are numbered 2 * pair for the chosen one, 2 * pair + 1 for the rejected one.
    """

    forest: Forest
    scored_rows: Tensor  # int64 [R], rows of the forest whose next token is scored
    targets: Tensor  # int64 [R], that next token
    n_window_rows: int  # the first n_window_rows of the scored rows belong to corpus windows
    entry_rows: Tensor  # int64 [E], into the scored rows
    entry_answers: Tensor  # int64 [E]
    n_pairs: int

    def to(self, device: torch.device) -> "Step":
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return replace(
            self,
            forest=self.forest.to(device),
            scored_rows=move(self.scored_rows),
            targets=move(self.targets),
            entry_rows=move(self.entry_rows),
            entry_answers=move(self.entry_answers),
        )


def build_step(windows: Sequence[np.ndarray], pairs: Sequence[Pair], share_prompts: bool = False) -> Step:
    """Windows are [T + 1] token ids (inputs and next tokens); pairs need a prompt and answers of at least one token.

    What both full sequences of a pair, prompt + chosen and prompt + rejected, begin with is its trunk; the last token of an answer is
    only ever a target. share_prompts: pairs with the same prompt share one trunk, and whatever else their answers have in common.
    """
    builder = ForestBuilder()
    window_handles = [builder.add(window[:-1]) for window in windows]
    parts = [part for rows in _trees(pairs, share_prompts) for part in _add_tree(builder, pairs, rows)]
    forest, starts = builder.build()

    rows = [starts[handle] + np.arange(window.size - 1) for handle, window in zip(window_handles, windows, strict=True)]
    targets = [window[1:] for window in windows]
    n_window_rows = n_scored = sum(len(r) for r in rows)
    entry_rows, entry_answers = [], []
    for part in parts:
        part_rows = [starts[handle] + offset for handle, offset in part.places]
        rows.append(np.array(part_rows, dtype=np.int64))
        targets.append(part.targets)
        for answer in part.answers:
            entry_rows.append(np.arange(n_scored, n_scored + len(part_rows)))
            entry_answers.append(np.full(len(part_rows), answer))
        n_scored += len(part_rows)

    return Step(
        forest,
        _concatenate(rows),
        _concatenate(targets),
        n_window_rows,
        _concatenate(entry_rows),
        _concatenate(entry_answers),
        n_pairs=len(pairs),
    )


class _Scored(NamedTuple):
    """Rows that score some tokens of one or more answers."""

    places: list[tuple[int, int]]  # (segment handle, offset in it) of each row
    targets: np.ndarray
    answers: list[int]  # as a Step numbers them


class _Branch(NamedTuple):
    """Sequences that agree up to token `depth` and in that token too."""

    answers: list[int]
    depth: int
    before: tuple[int, int]  # where the token before `depth` is: (segment handle, offset in it)


def _trees(pairs: Sequence[Pair], share_prompts: bool) -> list[list[int]]:
    """The numbers of the pairs of each tree."""
    if not share_prompts:
        return [[i] for i in range(len(pairs))]
    trees: dict[bytes, list[int]] = {}
    for i, (prompt, _, _) in enumerate(pairs):
        trees.setdefault(np.asarray(prompt, dtype=np.int64).tobytes(), []).append(i)
    return list(trees.values())


def _add_tree(builder: ForestBuilder, pairs: Sequence[Pair], rows: list[int]) -> list[_Scored]:
    """Adds pairs with the same prompt: what sequences have in common is one segment, and where they part each way is a child."""
    n_prompt = pairs[rows[0]][0].size
    full = {2 * i + a: np.concatenate([pairs[i][0], pairs[i][1 + a]]) for i in rows for a in (0, 1)}
    scored = []
    branches = [_Branch(list(full), 0, (-1, 0))]
    for answers, depth, before in branches:  # which grows meanwhile
        first = full[answers[0]]
        end = min(_n_common(first, full[answer]) for answer in answers)
        going_on: dict[int, list[int]] = {}
        for answer in answers:
            if full[answer].size > end:
                going_on.setdefault(int(full[answer][end]), []).append(answer)
        segment = builder.add(first[depth : end if going_on else end - 1], before[0])
        places = [before, *((segment, offset) for offset in range(end - depth - 1))]
        n_unscored = max(n_prompt - depth, 0)
        scored.append(_Scored(places[n_unscored:], first[depth + n_unscored : end], answers))
        branches += [_Branch(others, end, (segment, end - depth - 1)) for others in going_on.values()]
    return scored


def _n_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    shortest = min(a.size, b.size)
    differs = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(differs[0]) if differs.size else shortest


def _concatenate(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)
