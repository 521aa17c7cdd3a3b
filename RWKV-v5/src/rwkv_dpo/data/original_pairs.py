"""The original's pair file: a pickled list of (prompt_tokens, chosen_tokens, rejected_tokens, chosen_ref_logp, rejected_ref_logp).

A pickle is a program that may call whatever it can name. This reader lets it name nothing but two stand-ins of our own, enough
for numpy numbers, so it can build lists, tuples and numbers and call nothing else.
"""

import numbers
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_dpo.atomic import atomic_write
from rwkv_dpo.errors import InputError, refuse

_SHAPE = "(prompt_tokens, chosen_tokens, rejected_tokens, chosen_ref_logp, rejected_ref_logp)"


def read_original(path: Path) -> tuple[list[tuple[np.ndarray, ...]], np.ndarray]:
    """(prompt, chosen, rejected) int32 rows, and log-probabilities float64 [n, 2]. InputError when the file is torn, carries
    code, or has a row of another form; what the rows hold is for check_pairs to judge."""
    rows = _unpickle(path)
    if not isinstance(rows, list):
        refuse(f"{path}: not pairs: it holds a {type(rows).__name__}; expected a list of {_SHAPE}")
    triples, ref_logps = [], np.zeros((len(rows), 2))
    for i, row in enumerate(rows):
        source = f"{path}: row {i + 1}"
        if not isinstance(row, (tuple, list)) or len(row) != 5:
            refuse(f"{source}: not a 5-tuple {_SHAPE}")
        triples.append(tuple(_token_row(tokens, source) for tokens in row[:3]))
        for column, logp in enumerate(row[3:]):
            if not isinstance(logp, numbers.Real):
                refuse(f"{source}: its reference log-probability is a {type(logp).__name__}; expected a number")
            ref_logps[i, column] = logp
    return triples, ref_logps


def write_original(path: str | Path, rows: list[tuple[Any, ...]]) -> None:
    """Pickle the rows, atomically."""
    with atomic_write(path) as file:
        # Protocol 4 is what every Python since 3.4 reads.
        pickle.dump(rows, file, protocol=4)


def _token_row(tokens: object, source: str) -> np.ndarray:
    if not isinstance(tokens, (list, tuple)):
        refuse(f"{source}: its tokens are a {type(tokens).__name__}; expected a list of integers")
    try:
        row = np.asarray(tokens) if tokens else np.zeros(0, np.int64)
    except ValueError as error:
        raise InputError(f"{source}: its tokens are nested lists; expected a list of integers") from error
    if row.ndim != 1 or row.dtype.kind not in "iu":
        refuse(f"{source}: a token is not an integer")
    limits = np.iinfo(np.int32)
    for token in (row.min(initial=0), row.max(initial=0)):
        if not limits.min <= token <= limits.max:
            refuse(f"{source}: token {token} is in no vocabulary")
    return row.astype(np.int32)


def _unpickle(path: Path) -> object:
    with open(path, "rb") as file:
        try:
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


def _scalar(dtype: _Dtype, content: bytes) -> float | int:
    """Stands in for numpy's scalar constructor; integers and floats only."""
    if dtype.name[0] not in "iuf":
        raise InputError(f"carries a numpy {dtype.name}; expected numbers")
    return np.frombuffer(content, np.dtype(dtype.name).newbyteorder(">" if dtype.is_big_endian else "<"), 1)[0].item()


_STAND_INS = {
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise InputError(f"carries code ({module}.{name}); a pair file holds only lists, tuples and numbers")
        return _STAND_INS[module, name]
