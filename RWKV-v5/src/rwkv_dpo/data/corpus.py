"""The general corpus: one long array of tokens, whatever file it comes from (the original's --data_type)."""

import hashlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_dpo.base.errors import InputError, reading, refuse
from rwkv_dpo.data.binidx import read_binidx
from rwkv_dpo.data.documents import TEXT_ENDINGS
from rwkv_dpo.data.text_corpus import character_tokens, check_size, documents_of, holds_documents, vocabulary_of, world_tokens
from rwkv_dpo.data.text_files import ending
from rwkv_dpo.data.tokenizer import VOCAB_SIZE as WORLD_SIZE
from rwkv_dpo.files.kinds import Kind, refuse_others

# Up to this size, every token id is checked when the corpus is opened (a fraction of a second); above it, as windows are read.
_CHECKED_AT_ONCE = 100_000_000
_BLOCK = 1 << 22
_TEXTS = (Kind.TEXT, Kind.CSV, Kind.JSON, Kind.JSON_LINES, Kind.WEB_PAGE)
_MARKED = (Kind.LFS_POINTER, Kind.PARQUET, Kind.NUMPY, Kind.SAFETENSORS, Kind.PAIRS, Kind.TORCH_DICT, Kind.TORCH_LIST, Kind.TORCH)
# A fingerprint reads all of a corpus up to this number of blocks of this many tokens; of a larger corpus it reads as many blocks, evenly
# spaced.
_SAMPLED, _SAMPLED_BLOCK = 512, 1 << 16


@dataclass(frozen=True)
class Corpus:
    """`tokens` [n_tokens] of any integer type, possibly memory-mapped; `characters`: for character-level corpora, the vocabulary in order
    of token id, else empty; `how`: how text became tokens, in words."""

    source: str
    tokens: np.ndarray
    vocab_size: int
    characters: str = ""
    is_checked: bool = True
    how: str = ""

    @property
    def n_tokens(self) -> int:
        """The size of the whole corpus."""
        return len(self.tokens)

    def window(self, start: int, length: int) -> np.ndarray:
        """int64 [length] tokens from `start` on. InputError if a token is outside the vocabulary."""
        if not 0 <= start <= start + length <= self.n_tokens:
            raise IndexError(f"window {start} + {length} of a corpus of {self.n_tokens} tokens")
        tokens = np.asarray(self.tokens[start : start + length], dtype=np.int64)
        if not self.is_checked:
            _check_block(self.source, tokens, start, self.vocab_size)
        return tokens


def open_corpus(data_file: str, data_type: str, vocab_size: int, ctx_len: int, checkpoint: str = "") -> Corpus:
    """Open --data_file as --data_type says: utf-8, utf-16le (text), numpy (.npy), uint16 (raw little-endian), binidx (named without its
    ending), dummy (generated sums, no file).

    Text goes through the World tokenizer if vocab_size is the World's. Otherwise it is characters, numbered as in the vocab.json next to
    `checkpoint`. Without a checkpoint, they are numbered as they occur, and vocab_size 0 stands for their number.

    InputError if the file is missing, has another format, is shorter than ctx_len + 1 or has a token >= vocab_size; and for text whose
    characters the checkpoint's model has no numbers for.
    """
    if data_type in _TEXT_READERS:
        corpus = _text_corpus(data_file, data_type, vocab_size, checkpoint)
    elif data_type in _TOKEN_READERS:
        corpus = _token_corpus(_TOKEN_READERS[data_type](data_file), data_file, vocab_size)
    else:
        refuse(f"--data_type {data_type}: accepted are {', '.join((*_TEXT_READERS, *_TOKEN_READERS))}")
    if corpus.n_tokens < ctx_len + 1:
        refuse(f"{corpus.source}: {corpus.n_tokens} tokens, fewer than one window of --ctx_len {ctx_len} + 1")
    return corpus


def corpus_sha256(corpus: Corpus) -> str:
    """Fingerprint of the tokens, whatever file and integer type they come from, and of the characters that they stand for. A corpus of more
    than 33 million tokens is sampled: any change of its length shows, and a change of its content shows if a sampled block contains it."""
    digest = hashlib.sha256(f"{corpus.n_tokens} {corpus.characters}".encode())
    last = max(corpus.n_tokens - _SAMPLED_BLOCK, 0)
    is_small = corpus.n_tokens <= _SAMPLED * _SAMPLED_BLOCK
    starts = range(0, corpus.n_tokens, _SAMPLED_BLOCK) if is_small else (i * last // (_SAMPLED - 1) for i in range(_SAMPLED))
    for start in starts:
        digest.update(np.asarray(corpus.tokens[start : start + _SAMPLED_BLOCK], dtype="<i8").tobytes())
    return digest.hexdigest()


def _text_corpus(data_file: str, data_type: str, vocab_size: int, checkpoint: str) -> Corpus:
    source = data_file or data_type
    if data_file and os.path.isfile(data_file):
        refuse_others(data_file, "text", [kind for kind in Kind if kind is not Kind.LFS_POINTER])
    vocabulary, characters = vocabulary_of(checkpoint) if checkpoint else (None, "")
    if vocab_size == WORLD_SIZE:
        if characters:
            refuse(
                f"{source}: {checkpoint} has the World vocabulary, but {vocabulary} next to it lists {len(characters)} characters: move "
                "away the file that doesn't belong to the model"
            )
        tokens, n_documents = world_tokens(_texts(data_file, data_type))
        how = f"{n_documents:,} {'document' if n_documents == 1 else 'documents'} through the World tokenizer"
        return Corpus(source, tokens, vocab_size, how=how)
    if data_type == "utf-8" and holds_documents(data_file):
        refuse(
            f"{data_file}: characters are read from one plain text file; rows, folders and patterns are read through the World tokenizer, "
            f"for models with its vocabulary (without a checkpoint: --vocab_size {WORLD_SIZE})"
        )
    if checkpoint and not characters:
        refuse(
            f"{source}: text for {checkpoint}, whose {vocab_size} tokens are not the World's: a character-level model has a {vocabulary}; "
            "for another tokenizer, give its tokens (--data_type binidx, numpy or uint16)"
        )
    text = _TEXT_READERS[data_type](data_file)
    tokens, characters = character_tokens(text, characters, source, vocabulary)
    if vocab_size and vocab_size < len(characters):
        found = f"{vocabulary} has" if vocabulary else "the text has"
        refuse(f"{source}: {found} {len(characters)} different characters, more than --vocab_size {vocab_size}")
    how = f"{len(characters)} characters, numbered as in {vocabulary}" if vocabulary else f"numbers of its {len(characters)} characters"
    return Corpus(source, tokens, vocab_size or len(characters), characters, how=how)


def _texts(data_file: str, data_type: str) -> Iterable[str]:
    """Documents in the formats that make_data.py knows; any other file is one text."""
    is_file = data_type == "utf-8" and os.path.isfile(data_file) and ending(data_file) not in TEXT_ENDINGS
    if data_type == "utf-8" and not is_file:
        return documents_of(data_file)
    if data_type != "dummy":
        check_size(data_file, _existing(data_file).stat().st_size)
    return [_TEXT_READERS[data_type](data_file)]


def _token_corpus(tokens: np.ndarray, source: str, vocab_size: int) -> Corpus:
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        refuse(f"{source}: holds {tokens.dtype.name} {list(tokens.shape)}; a corpus is a one-dimensional array of integers")
    if vocab_size < 1:
        refuse(f"--vocab_size {vocab_size}: {source} holds token ids; give the size of their vocabulary")
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
            return _existing(data_file).read_text(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        refuse_others(data_file, f"{encoding} text", _TEXTS)
        raise InputError(f"{data_file}: not {encoding} text: {error.reason} at byte {error.start}") from error


def _read_numpy(data_file: str) -> np.ndarray:
    path = _existing(data_file)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
        # Later versions are for headers of more than 64 KB, and numpy allocates whatever size they claim.
        if head.startswith(np.lib.format.MAGIC_PREFIX) and head[6:] != b"\1\0":
            raise ValueError("not of .npy version 1.0")
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    # Its header is a Python literal: numpy's parser fails in more ways than numpy documents.
    except Exception as error:
        refuse_others(data_file, "a .npy file", (Kind.NUMPY, Kind.ZIP))
        raise InputError(f"{data_file}: not an intact .npy file of numbers") from error
    return array if isinstance(array, np.ndarray) else refuse(f"{data_file}: an .npz archive; expected one array (.npy)")


def _read_uint16(data_file: str) -> np.ndarray:
    n_bytes = _existing(data_file).stat().st_size
    # Any bytes could be tokens, but text and files that begin with a long signature are not meant to be.
    refuse_others(data_file, "bare tokens", [kind for kind in Kind if kind not in (*_TEXTS, *_MARKED)])
    if n_bytes % 2:
        refuse(f"{data_file}: {n_bytes} bytes, an odd number; expected uint16 tokens")
    with reading(data_file):
        return np.memmap(data_file, dtype="<u2", mode="r") if n_bytes else np.zeros(0, "<u2")


def _made_up_sums(_data_file: str) -> str:
    """Additions, one per line: a corpus that a small model visibly learns."""
    terms = np.random.default_rng(0).integers(0, 10_000, (50_000, 2)).tolist()
    return "".join(f"{a}+{b}={a + b}\n" for a, b in terms)


_TEXT_READERS: dict[str, Callable[[str], str]] = {
    "utf-8": lambda data_file: _read_text(data_file, "utf-8"),
    "utf-16le": lambda data_file: _read_text(data_file, "utf-16le"),
    "dummy": _made_up_sums,
}
_TOKEN_READERS: dict[str, Callable[[str], np.ndarray]] = {
    "numpy": _read_numpy,
    "uint16": _read_uint16,
    "binidx": lambda data_file: read_binidx(data_file).tokens,
}
