"""Which answers of a batch are set against each other: the graph that preference losses are functions of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rwkv_dpo.data.pairs import Pair

Sequences = list[tuple[np.ndarray, np.ndarray]]  # a prompt and an answer each


@dataclass(frozen=True)
class Comparisons:
    """P pairs of A answers in R rankings. A ranking is all that is compared within one prompt of a tree; of two answers it is a pair."""

    pairs: Tensor  # int64 [P, 2], the chosen and the rejected answer
    rankings: Tensor  # int64 [A], the ranking that each answer is in
    n_rankings: int
    lengths: Tensor  # int64 [A], tokens of each answer
    weights: Tensor  # fp32 [P], each pair's share of its ranking, by the difference of its scores; equal shares where one is unknown

    @property
    def n_answers(self) -> int:
        """A."""
        return self.rankings.numel()

    def to(self, device: torch.device) -> "Comparisons":
        """On another device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("pairs", "rankings", "lengths", "weights")}
        return replace(self, **moved)


def compare(
    pairs: Sequence[Pair], trees: Iterable[Sequence[int]] | None = None, scores: np.ndarray | None = None
) -> tuple[Comparisons, list[Sequences]]:
    """The comparisons, and the prompt and answer of each tree's answers, by their numbers from the first tree to the last.

    trees: numbers of the pairs of each, all pairs in all; None: each pair by itself. scores: [P, 2]; None: unknown.
    Answers to one prompt of a tree that are equal are one answer.
    """
    numbers = np.zeros((len(pairs), 2), np.int64)
    sequences: list[Sequences] = []
    rankings: list[int] = []
    n_rankings = 0
    for tree in [[i] for i in range(len(pairs))] if trees is None else trees:
        of_prompt: dict[bytes, int] = {}
        of_answer: dict[tuple[int, bytes], int] = {}
        sequences.append([])
        for i in tree:
            prompt, *answers = pairs[i]
            ranking = of_prompt.setdefault(_content(prompt), n_rankings + len(of_prompt))
            for side, answer in enumerate(answers):
                key = ranking, _content(answer)
                if key not in of_answer:
                    of_answer[key] = len(rankings)
                    rankings.append(ranking)
                    sequences[-1].append((prompt, answer))
                numbers[i, side] = of_answer[key]
        n_rankings += len(of_prompt)
    in_rankings = np.array(rankings, np.int64)
    weights = _weights(in_rankings[numbers[:, 0]], n_rankings, scores)
    lengths = torch.tensor([answer.size for tree in sequences for _, answer in tree], dtype=torch.int64)
    compared = Comparisons(torch.from_numpy(numbers), torch.from_numpy(in_rankings), n_rankings, lengths, torch.from_numpy(weights))
    return compared, sequences


def _weights(rankings: np.ndarray, n_rankings: int, scores: np.ndarray | None) -> np.ndarray:
    """[P], of pairs in these rankings."""
    gaps = np.ones(len(rankings)) if scores is None else scores[:, 0] - scores[:, 1]
    is_unknown = np.bincount(rankings, ~(gaps > 0), minlength=n_rankings) > 0
    gaps = np.where(is_unknown[rankings], 1.0, gaps)
    return (gaps / np.bincount(rankings, gaps, minlength=n_rankings)[rankings]).astype(np.float32)


def _content(tokens: np.ndarray) -> bytes:
    return np.asarray(tokens, np.int64).tobytes()
