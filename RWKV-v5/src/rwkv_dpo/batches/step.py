"""A micro-batch's windows and pairs as one forest, and which of its rows are scored for what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_dpo.batches.forest import Forest, ForestBuilder
from rwkv_dpo.data.pairs import Pair


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
