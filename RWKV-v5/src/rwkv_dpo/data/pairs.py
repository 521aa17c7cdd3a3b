"""Preference pairs (*.save): what a training run reads.

Two forms of file. The original's: a list of (prompt_tokens, chosen_tokens, rejected_tokens, chosen_ref_logp, rejected_ref_logp) that
torch.save wrote (original_pairs.py). Ours, packed: an uncompressed .npz archive of the arrays of PairSet and a JSON header, which loads
at the speed of the disk. Reading either executes nothing that the file brings along.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rwkv_dpo.base.errors import refuse

FORMAT = "rwkv_dpo pairs"
VERSION = 1
Pair = tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, chosen, rejected: token ids


@dataclass(frozen=True)
class PairSet:
    """n pairs, packed.

    tokens: int32, all prompts and answers in one row: prompt, chosen and rejected of pair 0, of pair 1, ...
    offsets: int64 [3n + 1], where each of them begins, and the end
    ref_logps: float64 [n, 2], log-probabilities of the chosen and the rejected answer (sums over answer tokens, nats) under the
        reference model; all NaN in a set that was not scored
    header: how the set came about: tokenizer, templates, ctx_len, reference_sha256, counts, ...; empty when unknown
    """

    tokens: np.ndarray
    offsets: np.ndarray
    ref_logps: np.ndarray
    header: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ref_logps)

    def pair(self, i: int) -> Pair:
        """(prompt, chosen, rejected) of pair i, int32 views."""
        start, chosen, rejected, end = self.offsets[3 * i : 3 * i + 4]
        return self.tokens[start:chosen], self.tokens[chosen:rejected], self.tokens[rejected:end]

    @property
    def is_scored(self) -> bool:
        """Whether every pair has its reference log-probabilities."""
        return not np.isnan(self.ref_logps).any()

    def with_ref_logps(self, ref_logps: np.ndarray, reference_sha256: str, reference_precision: str) -> "PairSet":
        """The same pairs, scored [n, 2] by the checkpoint with that fingerprint. InputError when a score is not finite."""
        scored = replace(
            self,
            ref_logps=np.asarray(ref_logps, dtype=np.float64).reshape(len(self), 2),
            header={**self.header, "reference_sha256": reference_sha256, "reference_precision": reference_precision},
        )
        if len(scored) and np.isnan(scored.ref_logps).all():
            refuse("reference scoring: the model gives NaN for every pair")
        check_pairs(scored, "reference scoring")
        return scored

    def select(self, rows: Iterable[int]) -> "PairSet":
        """The pairs of those rows, in that order."""
        rows = list(rows)
        return pack_pairs([self.pair(i) for i in rows], self.ref_logps[rows], self.header)


def pack_pairs(
    pairs: Sequence[Sequence[Any]], ref_logps: np.ndarray | None = None, header: Mapping[str, Any] | None = None
) -> PairSet:
    """PairSet of (prompt, chosen, rejected) token rows, unscored when ref_logps [n, 2] is None."""
    rows = [np.asarray(row, dtype=np.int32) for pair in pairs for row in pair]
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    tokens = np.concatenate(rows) if rows else np.zeros(0, np.int32)
    if ref_logps is None:
        ref_logps = np.full((len(pairs), 2), np.nan)
    return PairSet(tokens, offsets, np.asarray(ref_logps, dtype=np.float64).reshape(len(pairs), 2), header or {})


def join_pairs(sets: Sequence[PairSet]) -> PairSet:
    """The pairs of all sets, one set after the other, without a header."""
    starts = np.cumsum([0, *(len(pairs.tokens) for pairs in sets)])
    offsets = [pairs.offsets[:-1] + start for pairs, start in zip(sets, starts, strict=False)]
    return PairSet(
        np.concatenate([pairs.tokens for pairs in sets]),
        np.concatenate([*offsets, starts[-1:]]),
        np.concatenate([pairs.ref_logps for pairs in sets]),
    )


def check_pairs(pairs: PairSet, source: str, vocab_size: int | None = None) -> None:
    """Refuse, by row counted from 1: an empty prompt or answer, equal answers, a negative token or one >= vocab_size, a
    log-probability that is not finite (unless the whole set is unscored)."""
    lengths = np.diff(pairs.offsets).reshape(-1, 3)
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
    row = (np.searchsorted(pairs.offsets, position, side="right") - 1) // 3
    refuse(f"{source}: row {row + 1}: token {pairs.tokens[position]} {what}")


def cut_pair(
    prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, ctx_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int, int]:
    """Make prompt + longer answer fit into ctx_len tokens (at least 2).

    The prompt loses tokens from its left, but keeps at least ctx_len // 2 of them; then the answers lose from their right what
    still does not fit. Returns the three rows and how many tokens each lost.
    """
    excess = max(0, len(prompt) + max(len(chosen), len(rejected)) - ctx_len)
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
    """Fingerprint of the tokens of all pairs, in their order, whatever their scores and header."""
    digest = hashlib.sha256(np.ascontiguousarray(pairs.offsets, "<i8").tobytes())
    digest.update(np.ascontiguousarray(pairs.tokens, "<i4").tobytes())
    return digest.hexdigest()
