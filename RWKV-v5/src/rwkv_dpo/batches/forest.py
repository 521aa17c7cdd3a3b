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
    last_rows: Tensor  # int64 [n], the row of each segment's last token (an empty one's: what its parent ended with)
    before: Tensor  # int32 [S], the row whose token comes before each
    uses_start: Tensor  # int32 [S + n_roots + 1], into uses: where those of each row begin
    uses: Tensor  # int32 [S + n], by row: the rows that it comes before; S + i: segment i ends with it
    cu_seqlens: Tensor  # int32 [n + 1] on the CPU, where each segment starts
    parents: Tensor  # int32 [n] on the CPU, the segment that each continues; -1 for roots

    @property
    def n_segments(self) -> int:
        """Segments, empty ones included."""
        return self.last_rows.numel()

    @property
    def n_roots(self) -> int:
        """Segments that continue none."""
        return self.levels[0].last

    def to(self, device: torch.device) -> "Forest":
        """On another device."""
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        levels = tuple(level._replace(parents=None if level.parents is None else move(level.parents)) for level in self.levels)
        return replace(
            self,
            tokens=move(self.tokens),
            levels=levels,
            last_rows=move(self.last_rows),
            before=move(self.before),
            uses_start=move(self.uses_start),
            uses=move(self.uses),
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
        before_rows = np.arange(-1, n_rows - 1)
        before_rows[[starts[i] for i in filled]] = [before[i] for i in filled]
        used = np.concatenate([before_rows, last_rows]).astype(np.int64)
        n_uses = np.bincount(used, minlength=n_rows + parents.count(-1))
        forest = Forest(
            tokens=torch.from_numpy(np.concatenate([self._tokens[handle] for handle in order])),
            levels=tuple(self._levels(order, parents, starts)),
            last_rows=torch.tensor(last_rows, dtype=torch.int64),
            before=torch.from_numpy(before_rows.astype(np.int32)),
            uses_start=torch.from_numpy(np.concatenate([[0], n_uses.cumsum()]).astype(np.int32)),
            uses=torch.from_numpy(np.argsort(used, kind="stable").astype(np.int32)),
            cu_seqlens=torch.tensor(starts, dtype=torch.int32),
            parents=torch.tensor(parents, dtype=torch.int32),
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


