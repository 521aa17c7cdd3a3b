"""Preference pairs (*.save): what a training run reads.

Two forms of file. The original's: a list of (prompt_tokens, chosen_tokens, rejected_tokens, chosen_ref_logp, rejected_ref_logp) that
torch.save wrote (original_pairs.py). Ours, packed: an uncompressed .npz archive of the arrays of PairSet and a JSON header, which loads
at the speed of the disk. Reading either executes nothing that the file brings along.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from rwkv_dpo.base.errors import refuse

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, chosen, rejected: token ids


@dataclass(frozen=True)
class PairSet:
    """n pairs in m trees, packed. A tree is what a training step takes or leaves as a whole: pairs whose prompts have something in
    common, which is computed once, as is an answer that is in several pairs (trees.py).

    tokens: int32, r rows of token ids, prompts and answers, one after the other
    offsets: int64 [r + 1], where each of them begins, and the end
    rows: int64 [n, 3], the rows of each pair's prompt, chosen and rejected answer
    trees: int64 [m + 1], the first pair of each tree, and n
    scores: float64 [n, 2], what the data said of the chosen and the rejected answer, the better one higher; NaN where it said nothing
    ref_logps: float64 [n, 2], log-probabilities of the chosen and the rejected answer (sums over answer tokens, nats) under the
        reference model; all NaN in a set that was not scored
    header: how the set came about: tokenizer, templates, ctx_len, reference_sha256, counts, ...; empty when unknown
    """

    tokens: np.ndarray
    offsets: np.ndarray
    rows: np.ndarray
    trees: np.ndarray
    scores: np.ndarray
    ref_logps: np.ndarray
    header: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, i: int) -> Pair:
        """(prompt, chosen, rejected) of pair i, int32 views."""
        prompt, chosen, rejected = (self.tokens[self.offsets[row] : self.offsets[row + 1]] for row in self.rows[i])
        return prompt, chosen, rejected

    @property
    def n_trees(self) -> int:
        """Samples of a training run."""
        return len(self.trees) - 1

    def tree(self, t: int) -> range:
        """The pairs of a tree."""
        return range(self.trees[t], self.trees[t + 1])

    def tree_of(self, i: int) -> int:
        """The tree of pair i."""
        return int(np.searchsorted(self.trees, i, side="right")) - 1

    @property
    def tree_numbers(self) -> np.ndarray:
        """int64 [n], the tree of each pair."""
        return np.repeat(np.arange(self.n_trees), np.diff(self.trees))

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [n, 3], tokens of the prompt, the chosen and the rejected answer."""
        return np.diff(self.offsets)[self.rows]

    @property
    def tree_tokens(self) -> np.ndarray:
        """int64 [m], tokens of each tree's prompts and answers, each row once."""
        n_rows = len(self.offsets) - 1
        used = np.unique(self.tree_numbers[:, None] * n_rows + self.rows)
        counted = np.bincount(used // max(n_rows, 1), np.diff(self.offsets)[used % max(n_rows, 1)], minlength=self.n_trees)
        return counted.astype(np.int64)

    @cached_property
    def tree_prompts(self) -> np.ndarray:
        """int64 [m], prompts of each tree."""
        used = np.unique(self.tree_numbers * len(self.offsets) + self.rows[:, 0])
        return np.bincount(used // len(self.offsets), minlength=self.n_trees)

    @property
    def is_scored(self) -> bool:
        """Whether every pair has its reference log-probabilities."""
        return not np.isnan(self.ref_logps).any()

    @property
    def is_plain(self) -> bool:
        """Whether every pair is a tree with rows of its own, and nothing is known of scores."""
        n = len(self)
        are_alone = n == self.n_trees and np.array_equal(self.rows.ravel(), np.arange(3 * n))
        return are_alone and bool(np.isnan(self.scores).all())

    def with_ref_logps(self, ref_logps: np.ndarray, reference_sha256: str, reference_precision: str, quant: str = "none") -> "PairSet":
        """The same pairs, scored [n, 2] by the checkpoint with that fingerprint, held as --quant says. InputError when a score is not
        finite."""
        scored_by = {"reference_sha256": reference_sha256, "reference_precision": reference_precision}
        scored = replace(
            self,
            ref_logps=np.asarray(ref_logps, dtype=np.float64).reshape(len(self), 2),
            header={**self.header, **scored_by, **({"reference_quant": quant} if quant != "none" else {})},
        )
        if len(scored) and np.isnan(scored.ref_logps).all():
            refuse("reference scoring: the model gives NaN for every pair")
        check_pairs(scored, "reference scoring")
        return scored

    def select(self, pairs: Iterable[int]) -> "PairSet":
        """Those pairs, in that order; neighbours of one tree stay together."""
        numbers = np.fromiter(pairs, np.int64)
        rows, trees = self.rows[numbers], self.tree_numbers[numbers]
        kept, first, renamed = np.unique(rows, return_index=True, return_inverse=True)
        # Rows stand in the order in which pairs name them.
        order = np.argsort(first)
        place = np.argsort(order)
        lengths = np.diff(self.offsets)[kept[order]]
        parts = [self.tokens[self.offsets[row] : self.offsets[row + 1]] for row in kept[order]]
        starts = np.flatnonzero(np.diff(trees, prepend=-1))
        return PairSet(
            np.concatenate(parts) if parts else np.zeros(0, np.int32),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            place[renamed.reshape(rows.shape)].astype(np.int64),
            np.append(starts, len(numbers)).astype(np.int64),
            self.scores[numbers],
            self.ref_logps[numbers],
            self.header,
        )

    def alone(self) -> "PairSet":
        """The same pairs, each by itself, without scores: what the original's form can say."""
        return pack_pairs([self.pair(i) for i in range(len(self))], self.ref_logps, self.header)


def pack_pairs(
    pairs: Sequence[Sequence[Any]], ref_logps: np.ndarray | None = None, header: Mapping[str, Any] | None = None,
    scores: np.ndarray | None = None,
) -> PairSet:  # fmt: skip
    """PairSet of (prompt, chosen, rejected) token rows, each pair a tree; unscored when ref_logps [n, 2] is None, and so with scores."""
    rows = [np.asarray(row, dtype=np.int32) for pair in pairs for row in pair]
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    tokens = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    unknown = np.full((len(pairs), 2), np.nan)
    ref_logps, scores = (unknown if values is None else np.asarray(values, np.float64).reshape(-1, 2) for values in (ref_logps, scores))
    return replace(plain_pairs(tokens, offsets, ref_logps), scores=scores, header=header or {})


def plain_pairs(tokens: np.ndarray, offsets: np.ndarray, ref_logps: np.ndarray) -> PairSet:
    """n pairs that are trees of their own, without scores, whose prompts and answers stand in their order: offsets [3n + 1]."""
    n = len(ref_logps)
    return PairSet(tokens, offsets, np.arange(3 * n).reshape(n, 3), np.arange(n + 1), np.full((n, 2), np.nan), ref_logps)


def join_pairs(sets: Sequence[PairSet]) -> PairSet:
    """The pairs of all sets, one set after the other, without a header."""
    def joined(parts: list[np.ndarray], sizes: list[int]) -> np.ndarray:
        """Numbers that count from 0 in each part, to count on."""
        starts = np.cumsum([0, *sizes])
        moved = [part + start for part, start in zip(parts, starts, strict=False)]
        return np.concatenate(moved)

    end = [np.zeros(1, np.int64)]
    return PairSet(
        np.concatenate([pairs.tokens for pairs in sets]),
        joined([pairs.offsets[:-1] for pairs in sets] + end, [len(pairs.tokens) for pairs in sets]),
        joined([pairs.rows for pairs in sets], [len(pairs.offsets) - 1 for pairs in sets]),
        joined([pairs.trees[:-1] for pairs in sets] + end, [len(pairs) for pairs in sets]),
        np.concatenate([pairs.scores for pairs in sets]),
        np.concatenate([pairs.ref_logps for pairs in sets]),
    )


def check_pairs(pairs: PairSet, source: str, vocab_size: int | None = None) -> None:
    """Refuse, by row counted from 1: an empty prompt or answer, equal answers, a negative token or one >= vocab_size, a
    log-probability that is not finite (unless the whole set is unscored)."""
    lengths = pairs.lengths
    for column, name in enumerate(("prompt", "chosen answer", "rejected answer")):
        _refuse_first(source, lengths[:, column] == 0, f"the {name} is empty")
    for row in np.flatnonzero(lengths[:, 1] == lengths[:, 2]).tolist():
        _, chosen, rejected = pairs.pair(row)
        if np.array_equal(chosen, rejected):
            refuse(f"{source}: row {row + 1}: the chosen and the rejected answer are equal")
    if len(pairs.tokens):
        if pairs.tokens.min() < 0:
            _refuse_first_token(source, pairs, pairs.tokens < 0, "is negative")
        if vocab_size is not None and pairs.tokens.max() >= vocab_size:
            what = f"is outside the vocabulary of {vocab_size}; the pairs were made with another vocabulary"
            _refuse_first_token(source, pairs, pairs.tokens >= vocab_size, what)
    is_unscored = len(pairs) > 0 and np.isnan(pairs.ref_logps).all()
    if not is_unscored:
        _refuse_first(source, ~np.isfinite(pairs.ref_logps).all(axis=1), "a reference log-probability is not finite")


def _refuse_first(source: str, is_fault: np.ndarray, what: str) -> None:
    if is_fault.any():
        refuse(f"{source}: row {int(np.argmax(is_fault)) + 1}: {what}")


def _refuse_first_token(source: str, pairs: PairSet, is_fault: np.ndarray, what: str) -> None:
    position = int(np.argmax(is_fault))
    row = np.searchsorted(pairs.offsets, position, side="right") - 1
    first = int(np.argmax((pairs.rows == row).any(axis=1)))
    refuse(f"{source}: row {first + 1}: token {pairs.tokens[position]} {what}")


def cut_pair(
    prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, ctx_len: int, longest: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int, int]:
    """Make prompt + longer answer fit into ctx_len tokens (at least 2). longest: tokens of the longest answer to the same prompt, where
    there are others, so that it is cut alike for all of them.

    The prompt loses tokens from its left, but keeps at least ctx_len // 2 of them; then the answers lose from their right what
    still does not fit. Returns the three rows and how many tokens each lost.
    """
    excess = max(0, len(prompt) + max(len(chosen), len(rejected), longest) - ctx_len)
    n_prompt = max(len(prompt) - excess, min(len(prompt), ctx_len // 2))
    room = ctx_len - n_prompt
    kept = prompt[len(prompt) - n_prompt :], chosen[:room], rejected[:room]
    return *kept, len(prompt) - n_prompt, len(chosen) - len(kept[1]), len(rejected) - len(kept[2])


def content_sha256(pairs: PairSet, with_scores: bool) -> str:
    """Fingerprint of what a run takes from the pairs: the tokens, and the reference scores unless it computes its own."""
    digest = hashlib.sha256(pairs_sha256(pairs).encode())
    if with_scores:
        digest.update(np.ascontiguousarray(pairs.ref_logps, "<f8").tobytes())
    return digest.hexdigest()


def pairs_sha256(pairs: PairSet) -> str:
    """Fingerprint of all pairs, in their order: tokens, trees and scores, whatever their reference scores and header."""
    digest = hashlib.sha256(np.ascontiguousarray(pairs.offsets, "<i8").tobytes())
    digest.update(np.ascontiguousarray(pairs.tokens, "<i4").tobytes())
    if not pairs.is_plain:
        for numbers, dtype in ((pairs.rows, "<i8"), (pairs.trees, "<i8"), (pairs.scores, "<f8")):
            digest.update(np.ascontiguousarray(numbers, dtype).tobytes())
    return digest.hexdigest()
