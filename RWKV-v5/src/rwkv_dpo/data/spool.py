"""Documents tokenized once, on all cores, into a file without a name, to be read back in any order.

Memory holds a few blocks of text and 8 bytes a document, whatever the documents' sizes.
"""

import contextlib
import functools
import itertools
import os
import signal
import tempfile
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.tokenizer import DOCUMENT_END, WorldTokenizer

# Characters given to a process at a time: some 20 ms of work, long enough to be worth the way there and back.
_BLOCK = 1 << 18
_TOKEN = np.dtype("<u2")


class Spool:
    """Token documents in a file, in the order they came: `spool[i]` is uint16 [T], closed by the document end."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._ends = array("q", [0])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        start, end = self._ends[i], self._ends[i + 1]
        self._file.seek(start * _TOKEN.itemsize)
        return np.frombuffer(self._file.read((end - start) * _TOKEN.itemsize), _TOKEN)

    def extend(self, tokens: bytes, sizes: list[int]) -> None:
        """Append documents of those sizes. InputError when the disk is full."""
        rest = memoryview(tokens)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise InputError(f"{self._name}: cannot be written: {error.strerror}") from error
        for size in sizes:
            self._ends.append(self._ends[-1] + size)


@contextlib.contextmanager
def open_spool(beside: str | Path, texts: Iterable[str], n_processes: int = 0) -> Iterator[Spool]:
    """All `texts`, tokenized by so many processes (0: one a core), in a spool on the disk of the file `beside`; it vanishes with
    the block, and with the process. InputError when the disk is full or the folder cannot be written to."""
    try:
        # Unbuffered: what is read is a document here and a document there.
        file = tempfile.TemporaryFile(dir=Path(beside).parent, buffering=0)  # noqa: SIM115 - closed by the next block
    except OSError as error:
        raise InputError(f"{beside}: cannot be written: {error.strerror}") from error
    with file:
        spool = Spool(file, str(beside))  # type: ignore[arg-type]  # without a buffer, a BinaryIO too
        for tokens, sizes in encode_blocks(texts, n_processes or _n_cores()):
            spool.extend(tokens, sizes)
        yield spool


def encode_blocks(texts: Iterable[str], n_processes: int = 1) -> Iterator[tuple[bytes, list[int]]]:
    """uint16 tokens of a block of documents, each closed by the document end, and the documents' sizes; in order."""
    return _encoded(_blocks(texts), n_processes)


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    block: list[str] = []
    n_characters = 0
    for text in texts:
        block.append(text)
        n_characters += len(text)
        if n_characters >= _BLOCK:
            yield block
            block, n_characters = [], 0
    if block:
        yield block


def _encoded(blocks: Iterator[list[str]], n_processes: int) -> Iterator[tuple[bytes, list[int]]]:
    """Tokens and sizes of every block, in order."""
    first = list(itertools.islice(blocks, 2))
    blocks = itertools.chain(first, blocks)
    if n_processes == 1 or len(first) < 2:
        # Starting processes takes longer than a block.
        yield from map(_encode, blocks)
        return
    # An interrupt reaches every process; the one that started the others ends them.
    with ProcessPoolExecutor(n_processes, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        ahead: deque[Future[tuple[bytes, list[int]]]] = deque()
        for block in blocks:
            ahead.append(pool.submit(_encode, block))
            if len(ahead) > 2 * n_processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _encode(texts: list[str]) -> tuple[bytes, list[int]]:
    encode = _tokenizer().encode
    documents, sizes = [], []
    for text in texts:
        ids = encode(text)
        ids.append(DOCUMENT_END)
        # At once, not all together: numbers of Python take twenty times the memory, and the time to go through it.
        documents.append(np.array(ids, _TOKEN).tobytes())
        sizes.append(len(ids))
    return b"".join(documents), sizes


@functools.lru_cache(maxsize=1)
def _tokenizer() -> WorldTokenizer:
    return WorldTokenizer()


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
