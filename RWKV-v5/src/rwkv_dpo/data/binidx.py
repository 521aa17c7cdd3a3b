"""Token corpora in Megatron's indexed form: PREFIX.bin holds the tokens of all documents, PREFIX.idx where each begins.

    .idx, little-endian: magic "MMIDIDX\\0\\0", uint64 version (1), uint8 dtype code, uint64 n documents, uint64 m index
    entries, int32[n] sizes in tokens, int64[n] byte offsets into the .bin, int64[m] index entries (0 .. n, one more than
    documents when each document is one sequence, as json2binidx writes them)
"""

import os
import struct
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rwkv_dpo.base.errors import InputError, reading, refuse
from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.files.kinds import Kind, refuse_others

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, type] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float32, 7: np.float64, 8: np.uint16,
}  # fmt: skip
_HEADER = struct.Struct("<9sQBQQ")
_LARGEST_SIZE = 2**31 - 1


@dataclass(frozen=True)
class BinIdx:
    """An open corpus: `tokens` [n_tokens] is memory-mapped, `ends` int64 [n] is the end of each document."""

    tokens: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def document(self, i: int) -> np.ndarray:
        """Tokens of document i, a view."""
        return self.tokens[self.ends[i - 1] if i else 0 : self.ends[i]]


def read_binidx(prefix: str | Path) -> BinIdx:
    """Open PREFIX.bin and PREFIX.idx. InputError, naming the file, if one is missing or truncated, or if they disagree."""
    index_path, bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index_path, bin_path):
        if not os.path.isfile(path):
            refuse(f"{path}: no such file; a binidx corpus is named without its .bin and .idx")
    dtype, sizes, pointers = _read_index(index_path)
    ends = np.cumsum(sizes, dtype=np.int64)
    if np.any(sizes < 0) or np.any(pointers != (ends - sizes) * dtype.itemsize):
        refuse(f"{index_path}: its sizes and byte offsets disagree")
    n_tokens = int(ends[-1]) if len(ends) else 0
    n_bytes = bin_path.stat().st_size
    if n_bytes != (n_listed := n_tokens * dtype.itemsize):
        refuse_others(bin_path, "a corpus's tokens", [kind for kind in Kind if kind is not Kind.LFS_POINTER])
        refuse(f"{bin_path}: {n_bytes} bytes, but {index_path.name} lists {n_tokens} {dtype.name} tokens, {n_listed} bytes")
    # An empty file cannot be mapped.
    with reading(bin_path):
        tokens = np.memmap(bin_path, dtype=dtype, mode="r") if n_tokens else np.zeros(0, dtype)
    return BinIdx(tokens, ends)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    with reading(path):
        content = path.read_bytes()
    if content[: len(MAGIC)] != MAGIC:
        refuse_others(path, "a binidx index", (Kind.BINIDX,))
        refuse(f"{path}: not a binidx index (it does not begin with {MAGIC[:7].decode()})")
    if len(content) < _HEADER.size:
        refuse(f"{path}: truncated: {len(content)} bytes, and the header alone has {_HEADER.size}")
    _, version, code, n, m = _HEADER.unpack_from(content)
    if version != VERSION:
        refuse(f"{path}: version {version}; only version {VERSION} is known")
    if code not in DTYPES:
        refuse(f"{path}: dtype code {code}; accepted are 1 to 8")
    n_bytes = _HEADER.size + 12 * n + 8 * m
    if len(content) != n_bytes:
        refuse(f"{path}: {len(content)} bytes, but its header claims {n} documents and {m} index entries: {n_bytes}")
    sizes = np.frombuffer(content, "<i4", n, _HEADER.size)
    pointers = np.frombuffer(content, "<i8", n, _HEADER.size + 4 * n)
    return np.dtype(DTYPES[code]).newbyteorder("<"), sizes, pointers


def write_binidx(prefix: str | Path, documents: Iterable[np.ndarray], dtype: type = np.uint16) -> tuple[int, int]:
    """Write PREFIX.bin and PREFIX.idx, streaming and atomically; returns the numbers of documents and of tokens. Each document is an
    integer array [T]. InputError for a token that `dtype` cannot hold. It takes 4 bytes of memory per document while they arrive, and some
    30 at the end, when the index is written."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    stored = np.dtype(dtype).newbyteorder("<")
    sizes = array("i")
    with atomic_write(f"{prefix}.idx") as index_file, atomic_write(f"{prefix}.bin") as bin_file:
        for document in documents:
            tokens = document.astype(stored, copy=False)
            if tokens is not document and not np.array_equal(tokens, document):
                raise InputError(f"{prefix}.bin: document {len(sizes) + 1} has a token that {stored.name} cannot hold")
            if len(tokens) > _LARGEST_SIZE:
                raise InputError(f"{prefix}.bin: document {len(sizes) + 1} has {len(tokens)} tokens, more than {_LARGEST_SIZE}")
            bin_file.write(tokens.tobytes())
            sizes.append(len(tokens))
        n, ends = len(sizes), np.cumsum(sizes, dtype=np.int64)
        index_file.write(_HEADER.pack(MAGIC, VERSION, code, n, n + 1))
        index_file.write(np.asarray(sizes, "<i4").tobytes())
        index_file.write(((ends - sizes) * stored.itemsize).astype("<i8").tobytes())
        index_file.write(np.arange(n + 1, dtype="<i8").tobytes())
        for file in (bin_file, index_file):
            file.flush()
            os.fsync(file.fileno())
        # Two names cannot move at once. Without the old index a reader meets the old pair, the new pair or, after a crash
        # Two names cannot be replaced at once. Without the old index, a reader meets the old pair, the new pair or, after a crash right
        # here, a corpus that it refuses; never the tokens of one with the sizes of the other.
        Path(f"{prefix}.idx").unlink(missing_ok=True)
    return n, int(ends[-1]) if n else 0
