"""Preference pairs (*.save): what a training run reads.

Two forms of file. The original's: a list of (prompt_tokens, chosen_tokens, rejected_tokens, chosen_ref_logp, rejected_ref_logp) that
torch.save wrote (original_pairs.py). Ours, packed: an uncompressed .npz archive of the arrays of PairSet and a JSON header, which loads
at the speed of the disk. Reading either executes nothing that the file brings along.
"""

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rwkv_dpo.atomic import atomic_write
from rwkv_dpo.data.original_pairs import read_original, write_original
from rwkv_dpo.errors import InputError, refuse
from rwkv_dpo.file_kinds import Kind, kind_of, refuse_others
from rwkv_dpo.json_text import as_json

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


def load_pairs(path: str | Path, vocab_size: int | None = None) -> PairSet:
    """Read a pair file of either form and check every row; token ids against vocab_size too where it is given.

    InputError: no such file, torn, not pairs, carries code, or a row (counted from 1) that cannot be trained on.
    """
    path = Path(path)
    if not os.path.isfile(path):
        refuse(f"{path}: a folder; a pair file in it is wanted" if os.path.isdir(path) else f"{path}: no such pair file")
    refuse_others(path, "a pair file", (Kind.PAIRS, Kind.TORCH_LIST, Kind.TORCH, Kind.PICKLE))
    pairs = _read_packed(path) if kind_of(path) == Kind.PAIRS else pack_pairs(*read_original(path))
    check_pairs(pairs, str(path), vocab_size)
    return pairs


def open_pairs(flag: str, path: str, vocab_size: int | None = None) -> PairSet:
    """The pairs that a flag names, at least one. InputError as of load_pairs, which names the flag too."""
    try:
        pairs = load_pairs(path, vocab_size)
    except InputError as error:
        raise InputError(f"--{flag} {error}") from error
    return pairs if len(pairs) else refuse(f"--{flag} {path}: holds no pairs")


def save_pairs(path: str | Path, pairs: PairSet) -> None:
    """Write the packed form, atomically."""
    with atomic_write(path) as file:
        write_packed(file, pairs)


def write_packed(file: BinaryIO, pairs: PairSet) -> None:
    """Equal sets make equal bytes."""
    header = {**pairs.header, "format": FORMAT, "version": VERSION, "n_pairs": len(pairs)}
    encoded = np.frombuffer(as_json(header, sort_keys=True).encode(), dtype=np.uint8)
    np.savez(file, header=encoded, tokens=pairs.tokens, offsets=pairs.offsets, ref_logps=pairs.ref_logps)


def save_original(path: str | Path, pairs: PairSet) -> None:
    """Write the original's form, atomically. It has no place for the header, nor for pairs without reference scores."""
    if not pairs.is_scored:
        refuse(f"{path}: the original's form needs reference log-probabilities, and these pairs have none")
    with atomic_write(path) as file:
        write_as_original(file, pairs)


def write_as_original(file: BinaryIO, pairs: PairSet) -> None:
    """The scored pairs as torch.save writes a list of them."""
    write_original(file, [(*(row.tolist() for row in pairs.pair(i)), *pairs.ref_logps[i].tolist()) for i in range(len(pairs))])


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


def _read_packed(path: Path) -> PairSet:
    try:
        with zipfile.ZipFile(path) as archive:
            names = ("header", "tokens", "offsets", "ref_logps")
            encoded, tokens, offsets, ref_logps = (_member(archive, name, path.stat().st_size) for name in names)
            header = json.loads(encoded.tobytes())
            pairs = PairSet(tokens, offsets, ref_logps, header)
    # A damaged archive can fail anywhere in zipfile, zlib, numpy's header or JSON, and they promise no particular exception.
    except Exception as error:
        raise InputError(f"{path}: not a whole pair file: {error or type(error).__name__}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        refuse(f"{path}: not a pair file: its header does not say {FORMAT!r}")
    if header.get("version") != VERSION:
        refuse(f"{path}: pair format version {header.get('version')}; only version {VERSION} is known")
    if not _is_packed_well(pairs):
        refuse(f"{path}: not a pair file: its arrays disagree with each other")
    return pairs


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> np.ndarray:
    """An array of an .npz archive. ValueError unless it is stored as it is, takes no more than `limit` bytes, and is as large as its
    own header says."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.file_size > limit:
        raise ValueError(f"its {name} are compressed, or larger than the file")
    content = archive.read(info)
    head = io.BytesIO(content)
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError(f"its {name} are not of .npy version 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(head)
    if is_fortran or dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content) - head.tell():
        raise ValueError(f"the header of its {name} does not fit what follows")
    # A bytearray, because torch warns of memory that cannot be written to.
    return np.frombuffer(bytearray(content), dtype, offset=head.tell()).reshape(shape)


def _is_packed_well(pairs: PairSet) -> bool:
    tokens, offsets, ref_logps = pairs.tokens, pairs.offsets, pairs.ref_logps
    return (
        (tokens.dtype, offsets.dtype, ref_logps.dtype) == (np.int32, np.int64, np.float64)
        and tokens.ndim == offsets.ndim == 1
        and ref_logps.shape == (len(offsets) // 3, 2)
        and len(offsets) % 3 == 1
        and offsets[0] == 0
        and offsets[-1] == len(tokens)
        # Not by their differences, which wrap around.
        and bool((offsets[1:] >= offsets[:-1]).all())
    )


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


def file_sha256(path: str | Path) -> str:
    """Fingerprint of a file, as headers carry it for the reference checkpoint."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
