"""The original's pair file: a pickled list of (prompt_tokens, chosen_tokens, rejected_tokens, chosen_ref_logp, rejected_ref_logp).

A pickle is a program that may call whatever it can name. This reader lets it name nothing but two stand-ins of our own, enough
for numpy numbers, so it can build lists, tuples and numbers and call nothing else.
"""

import mmap
import numbers
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_dpo.atomic import atomic_write
from rwkv_dpo.errors import InputError, reading, refuse
from rwkv_dpo.pickles import scan_pickle

_SHAPE = "(prompt_tokens, chosen_tokens, rejected_tokens, chosen_ref_logp, rejected_ref_logp)"
# What lists, tuples, numbers and numpy numbers need. Dictionaries and sets can be made to take quadratic time.
_OPCODES = frozenset(
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.name not in ("SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET", "BYTEARRAY8", "EXT1", "EXT2", "EXT4")
)
# A token takes two bytes or more. Rows may share a list, as those of one prompt do, but not so that a small file fills the memory.
_TOKENS_PER_BYTE = 16


def read_original(path: Path) -> tuple[list[tuple[np.ndarray, ...]], np.ndarray]:
    """(prompt, chosen, rejected) int32 rows, and log-probabilities float64 [n, 2]. InputError when the file is torn, carries
    code, or has a row of another form; what the rows hold is for check_pairs to judge."""
    rows = _unpickle(path)
    if not isinstance(rows, list):
        refuse(f"{path}: not pairs: it holds a {type(rows).__name__}; expected a list of {_SHAPE}")
    triples, ref_logps = [], np.zeros((len(rows), 2))
    room = _TOKENS_PER_BYTE * path.stat().st_size
    for i, row in enumerate(rows):
        source = f"{path}: row {i + 1}"
        if not isinstance(row, (tuple, list)) or len(row) != 5:
            refuse(f"{source}: not a 5-tuple {_SHAPE}")
        room -= sum(len(tokens) for tokens in row[:3] if isinstance(tokens, (list, tuple)))
        if room < 0:
            refuse(f"{source}: the rows so far share lists of more than {_TOKENS_PER_BYTE} tokens for each byte of the file")
        triples.append(tuple(_token_row(tokens, source) for tokens in row[:3]))
        for column, logp in enumerate(row[3:]):
            if not isinstance(logp, numbers.Real):
                refuse(f"{source}: its reference log-probability is a {type(logp).__name__}; expected a number")
            try:
                ref_logps[i, column] = logp
            except OverflowError as error:
                raise InputError(f"{source}: its reference log-probability is a number of more than 308 digits") from error
    return triples, ref_logps


def write_original(path: str | Path, rows: list[tuple[Any, ...]]) -> None:
    """Pickle the rows, atomically."""
    with atomic_write(path) as file:
        # Protocol 4 is what every Python since 3.4 reads.
        pickle.dump(rows, file, protocol=4)


def _token_row(tokens: object, source: str) -> np.ndarray:
    if not isinstance(tokens, (list, tuple)):
        refuse(f"{source}: its tokens are a {type(tokens).__name__}; expected a list of integers")
    # Looked at before numpy does: nested lists that share one another can be larger than any memory.
    kinds = set(map(type, tokens))
    if kinds & {list, tuple}:
        refuse(f"{source}: its tokens are nested lists; expected a list of integers")
    row = np.asarray(tokens) if kinds == {int} else np.zeros(0, np.float64 if kinds else np.int64)
    if row.dtype.kind not in "iu":
        refuse(f"{source}: a token is not an integer")
    limits = np.iinfo(np.int32)
    for token in (row.min(initial=0), row.max(initial=0)):
        if not limits.min <= token <= limits.max:
            refuse(f"{source}: token {token} is in no vocabulary")
    return row.astype(np.int32)


def _unpickle(path: Path) -> object:
    with reading(path), open(path, "rb") as file:
        try:
            if path.stat().st_size:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    scan_pickle(content, 0, _OPCODES)
            return _Unpickler(file).load()
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        # A torn or foreign file can fail at any opcode, and the pickle module promises no particular exception.
        except Exception as error:
            raise InputError(f"{path}: not a pair file, or a torn one: {error or type(error).__name__}") from error


class _Dtype:
    """Stands in for numpy.dtype: remembers its name and whether it is stored the other way round."""

    def __init__(self, name: str, *_flags: object) -> None:
        self.name, self.is_big_endian = name, False

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.is_big_endian = state[1] == ">"


class _Scalar:
    """Stands in for numpy's scalar constructor: called, it gives a number of Python. Integers and floats only."""

    def __new__(cls, dtype: _Dtype, content: bytes) -> Any:
        if dtype.name[0] not in "iuf":
            raise InputError(f"carries a numpy {dtype.name}; expected numbers")
        return np.frombuffer(content, np.dtype(dtype.name).newbyteorder(">" if dtype.is_big_endian else "<"), 1)[0].item()

    def __setstate__(self, state: object) -> None:
        """A pickle may set the state of what it can name. Without this method that would write into the class itself."""
        raise InputError("carries code (state for numpy's scalar)")


_STAND_INS = {
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _Scalar,
    ("numpy._core.multiarray", "scalar"): _Scalar,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise InputError(f"carries code ({module}.{name}); a pair file holds only lists, tuples and numbers")
        return _STAND_INS[module, name]
