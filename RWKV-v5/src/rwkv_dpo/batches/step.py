"""A micro-batch's windows and pairs as one forest, and which of its rows are scored for what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_dpo.batches.comparisons import Comparisons, Sequences, compare
from rwkv_dpo.batches.forest import Forest, ForestBuilder
from rwkv_dpo.data.pairs import Pair


@dataclass(frozen=True)
class Step:
    """One micro-batch: corpus windows and preference pairs as a forest, and which rows score what.

    Scored rows come windows first. A row before which answers haven't parted counts for all of them, so sequence
    log-probabilities are sums over (entry_rows, entry_answers): scored row entry_rows[e] counts towards answer
    entry_answers[e].
    """

    forest: Forest
    scored_rows: Tensor  # int64 [R], rows of the forest whose next token is scored
    targets: Tensor  # int64 [R], that next token
    n_window_rows: int  # the first n_window_rows of the scored rows belong to corpus windows
    entry_rows: Tensor  # int64 [E], into the scored rows
    entry_answers: Tensor  # int64 [E]
    compared: Comparisons  # of the answers

    @property
    def n_pairs(self) -> int:
        """Pairs of answers that are compared."""
        return len(self.compared.pairs)

    def to(self, device: torch.device) -> "Step":
        """On another device."""
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return replace(
            self,
            forest=self.forest.to(device),
            scored_rows=move(self.scored_rows),
            targets=move(self.targets),
            entry_rows=move(self.entry_rows),
            entry_answers=move(self.entry_answers),
            compared=self.compared.to(device),
        )


def build_step(
    windows: Sequence[np.ndarray], pairs: Sequence[Pair], trees: Sequence[Sequence[int]] | None = None, scores: np.ndarray | None = None
) -> Step:
    """Windows are [T + 1] token ids (inputs and next tokens); pairs need a prompt and answers of at least one token.

    trees, scores: of the pairs, as comparisons.compare takes them. What sequences of a tree, prompt + answer, begin with alike is
    computed once; the last token of an answer is only ever a target.
    """
    builder = ForestBuilder()
    window_handles = [builder.add(window[:-1]) for window in windows]
    compared, sequences = compare(pairs, trees, scores)
    parts: list[_Scored] = []
    first = 0
    for tree in sequences:
        parts += _add_tree(builder, tree, first)
        first += len(tree)
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
        compared,
    )


class _Scored(NamedTuple):
    """Rows that score some tokens of one or more answers."""

    places: list[tuple[int, int]]  # (segment handle, offset in it) of each row
    targets: np.ndarray
    answers: list[int]  # as the comparisons number them


class _Branch(NamedTuple):
    """Sequences that agree up to token `depth` and in that token too."""

    answers: list[int]
    depth: int
    before: tuple[int, int]  # where the token before `depth` is: (segment handle, offset in it)


def _add_tree(builder: ForestBuilder, sequences: Sequences, first: int) -> list[_Scored]:
    """Adds a tree, whose answers are numbered from `first` on: what sequences have in common is one segment, and where they part each
    way is a child."""
    full = {first + i: np.concatenate(sequence) for i, sequence in enumerate(sequences)}
    n_prompt = {first + i: prompt.size for i, (prompt, _) in enumerate(sequences)}
    scored = []
    branches = [_Branch(list(full), 0, (-1, 0))]
    for answers, depth, before in branches:  # which grows meanwhile
        tokens = full[answers[0]]
        end = min(_n_common(tokens, full[answer]) for answer in answers)
        going_on: dict[int, list[int]] = {}
        for answer in answers:
            if full[answer].size > end:
                going_on.setdefault(int(full[answer][end]), []).append(answer)
        segment = builder.add(tokens[depth : end if going_on else end - 1], before[0])
        places = [before, *((segment, offset) for offset in range(end - depth - 1))]
        # What belongs to the prompt of one answer may belong to another one, to an earlier turn.
        begins = sorted({max(n_prompt[answer], depth) for answer in answers})
        for start, stop in pairwise([*(begin for begin in begins if begin < end), end]):
            is_scored = [answer for answer in answers if n_prompt[answer] <= start]
            scored.append(_Scored(places[start - depth : stop - depth], tokens[start:stop], is_scored))
        branches += [_Branch(others, end, (segment, end - depth - 1)) for others in going_on.values()]
    return scored


def _n_common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens both begin with."""
    shortest = min(a.size, b.size)
    differs = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(differs[0]) if differs.size else shortest


def _concatenate(parts: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.zeros(0, dtype=torch.int64)
