"""The general corpus: one long row of tokens, whatever file it comes from (the original's --data_type)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_dpo.data.binidx import read_binidx
from rwkv_dpo.errors import InputError, reading, refuse

# Up to here every token id is checked when the corpus is opened (a fraction of a second); beyond, as windows are read.
_CHECKED_AT_ONCE = 100_000_000
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Corpus:
    """`tokens` [n_tokens] of any integer type, perhaps memory-mapped; `characters`: for character corpora, the vocabulary
    in order of token id, else empty."""

    source: str
    tokens: np.ndarray
    vocab_size: int
    characters: str = ""
    is_checked: bool = True

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        """int64 [length] tokens from `start` on. InputError when a token is outside the vocabulary."""
        if not 0 <= start <= start + length <= self.n_tokens:
            raise IndexError(f"window {start} + {length} of a corpus of {self.n_tokens} tokens")
        tokens = np.asarray(self.tokens[start : start + length], dtype=np.int64)
        if not self.is_checked:
            _check_block(self.source, tokens, start, self.vocab_size)
        return tokens


def open_corpus(data_file: str, data_type: str, vocab_size: int, ctx_len: int) -> Corpus:
    """Open --data_file as --data_type says: utf-8, utf-16le (characters; the vocabulary is found in the text when vocab_size
    is 0), numpy (.npy), uint16 (raw little-endian), binidx (named without its ending), dummy (sums made up here, no file).

    InputError when the file is missing or of another form, shorter than ctx_len + 1, or has a token >= vocab_size.
    """
    if data_type in _CHARACTER_READERS:
        corpus = _character_corpus(_CHARACTER_READERS[data_type](data_file), data_file or data_type, vocab_size)
    elif data_type in _TOKEN_READERS:
        corpus = _token_corpus(_TOKEN_READERS[data_type](data_file), data_file, vocab_size)
    else:
        refuse(f"--data_type {data_type}: accepted are {', '.join((*_CHARACTER_READERS, *_TOKEN_READERS))}")
    if corpus.n_tokens < ctx_len + 1:
        refuse(f"{corpus.source}: {corpus.n_tokens} tokens, fewer than one window of --ctx_len {ctx_len} + 1")
    return corpus


def _character_corpus(text: str, source: str, vocab_size: int) -> Corpus:
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    found, tokens = np.unique(codes, return_inverse=True)
    if vocab_size and vocab_size < len(found):
        refuse(f"{source}: the text has {len(found)} different characters, more than --vocab_size {vocab_size}")
    return Corpus(source, tokens.astype(np.int32), vocab_size or len(found), "".join(map(chr, found)))


def _token_corpus(tokens: np.ndarray, source: str, vocab_size: int) -> Corpus:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        refuse(f"{source}: holds {tokens.dtype.name} {list(tokens.shape)}; a corpus is one row of integers")
    if vocab_size < 1:
        refuse(f"--vocab_size {vocab_size}: {source} holds token ids; name the size of their vocabulary")
    limits = np.iinfo(tokens.dtype)
    if limits.min == 0 and limits.max < vocab_size:
        return Corpus(source, tokens, vocab_size)
    is_checked = len(tokens) <= _CHECKED_AT_ONCE
    if is_checked:
        for start in range(0, len(tokens), _BLOCK):
            _check_block(source, tokens[start : start + _BLOCK], start, vocab_size)
    return Corpus(source, tokens, vocab_size, is_checked=is_checked)


def _check_block(source: str, tokens: np.ndarray, offset: int, vocab_size: int) -> None:
    if len(tokens) and (tokens.max() >= vocab_size or tokens.min() < 0):
        first = int(np.argmax((tokens >= vocab_size) | (tokens < 0)))
        raise InputError(f"{source}: token {int(tokens[first])} at offset {offset + first} is outside --vocab_size {vocab_size}")


def _existing(data_file: str) -> Path:
    return Path(data_file) if os.path.isfile(data_file) else refuse(f"--data_file {data_file!r}: no such file")


def _read_text(data_file: str, encoding: str) -> str:
    try:
        with reading(data_file):
            return _existing(data_file).read_text(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{data_file}: not {encoding} text: {error.reason} at byte {error.start}") from error


def _read_numpy(data_file: str) -> np.ndarray:
    path = _existing(data_file)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
        # Later versions are for headers of more than 64 KB, and numpy allocates whatever size they give.
        if head.startswith(np.lib.format.MAGIC_PREFIX) and head[6:] != b"\1\0":
            raise ValueError("not of .npy version 1.0")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # Its header is a Python literal: numpy's parser fails in more ways than numpy documents.
    except Exception as error:
        raise InputError(f"{data_file}: not a whole .npy file of numbers") from error
    return array if isinstance(array, np.ndarray) else refuse(f"{data_file}: an .npz archive; expected one array (.npy)")


def _read_uint16(data_file: str) -> np.ndarray:
    n_bytes = _existing(data_file).stat().st_size
    if n_bytes % 2:
        refuse(f"{data_file}: {n_bytes} bytes, an odd number; expected uint16 tokens")
    with reading(data_file):
        return np.memmap(data_file, dtype="<u2", mode="r") if n_bytes else np.zeros(0, "<u2")


def _made_up_sums(_data_file: str) -> str:
    """Additions, one a line: a corpus that a small model learns visibly."""
    terms = np.random.default_rng(0).integers(0, 10_000, (50_000, 2)).tolist()
    return "".join(f"{a}+{b}={a + b}\n" for a, b in terms)


_CHARACTER_READERS: dict[str, Callable[[str], str]] = {
    "utf-8": lambda data_file: _read_text(data_file, "utf-8"),
    "utf-16le": lambda data_file: _read_text(data_file, "utf-16le"),
    "dummy": _made_up_sums,
}
_TOKEN_READERS: dict[str, Callable[[str], np.ndarray]] = {
    "numpy": _read_numpy,
    "uint16": _read_uint16,
    "binidx": lambda data_file: read_binidx(data_file).tokens,
}
