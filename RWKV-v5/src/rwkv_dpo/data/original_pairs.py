"""The original's pair file: a list of (prompt_tokens, chosen_tokens, rejected_tokens, chosen_ref_logp, rejected_ref_logp) that
torch.save wrote, in either of its forms, or a bare pickle of it.

Tokens are lists or tensors of integers, log-probabilities numbers or tensors of one, wherever a tensor was (see pickled_numbers.py for
how they are read).
"""

import io
import numbers
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.pickled_numbers import load_numbers
from rwkv_dpo.data.stored_numbers import Numbers

_SHAPE = "(prompt_tokens, chosen_tokens, rejected_tokens, chosen_ref_logp, rejected_ref_logp)"
# A token takes a byte or more. Rows may share a list, as those of one prompt do, but not so that a small file fills the memory: a token
# takes four bytes in its row and four where the rows are packed, and docs/reliability.md promises 64 for a byte of the file.
_TOKENS_PER_BYTE = 7


def read_original(path: Path) -> tuple[list[tuple[np.ndarray, ...]], np.ndarray]:
    """(prompt, chosen, rejected) int32 rows, and log-probabilities float64 [n, 2]. InputError when the file is truncated, carries
    code, or has a row of another form; what the rows hold is for check_pairs to judge."""
    rows = load_numbers(path)
    if not isinstance(rows, list | tuple):
        refuse(f"{path}: not pairs: it holds {_name(rows)}; expected a list of {_SHAPE}")
    triples, ref_logps = [], np.zeros((len(rows), 2))
    room = _TOKENS_PER_BYTE * path.stat().st_size
    for i, row in enumerate(rows):
        source = f"{path}: row {i + 1}"
        if not isinstance(row, tuple | list) or len(row) != 5:
            refuse(f"{source}: not a 5-tuple {_SHAPE}")
        room -= sum(_length(tokens) for tokens in row[:3])
        if room < 0:
            refuse(f"{source}: the rows so far share lists of more than {_TOKENS_PER_BYTE} tokens for each byte of the file")
        triples.append(tuple(_token_row(tokens, source) for tokens in row[:3]))
        ref_logps[i] = [_logp(logp, source) for logp in row[3:]]
    return triples, ref_logps


def write_original(file: BinaryIO, rows: list[tuple[Any, ...]]) -> None:
    """As torch.save writes it."""
    import torch  # here, because reading does without

    # In memory first: torch reports a full disk as an error of its own.
    content = io.BytesIO()
    torch.save(rows, content)
    file.write(content.getbuffer())


def _length(tokens: object) -> int:
    return tokens.n if isinstance(tokens, Numbers) else len(tokens) if isinstance(tokens, list | tuple) else 0


def _token_row(tokens: object, source: str) -> np.ndarray:
    if isinstance(tokens, Numbers):
        row = _array(tokens, f"{source}: its tokens")
    elif isinstance(tokens, list | tuple):
        # Looked at before numpy does: nested lists that share one another can be larger than any memory.
        kinds = set(map(type, tokens))
        if kinds & {list, tuple}:
            refuse(f"{source}: its tokens are nested lists; expected a list of integers")
        row = np.asarray(tokens) if kinds == {int} else np.zeros(0, np.float64 if kinds else np.int64)
    else:
        refuse(f"{source}: its tokens are {_name(tokens)}; expected a list or a tensor of integers")
    if row.dtype.kind not in "iu":
        refuse(f"{source}: a token is not an integer")
    limits = np.iinfo(np.int32)
    for token in (row.min(initial=0), row.max(initial=0)):
        if not limits.min <= token <= limits.max:
            refuse(f"{source}: token {token} is in no vocabulary")
    return row.astype(np.int32)


def _logp(logp: object, source: str) -> float:
    if isinstance(logp, Numbers):
        if logp.n != 1:
            refuse(f"{source}: its reference log-probability is a tensor or an array of {logp.n} numbers; expected one")
        return float(_array(logp, f"{source}: its reference log-probability")[0])
    if not isinstance(logp, numbers.Real):
        refuse(f"{source}: its reference log-probability is {_name(logp)}; expected a number")
    try:
        return float(logp)
    except OverflowError as error:
        raise InputError(f"{source}: its reference log-probability is a number of more than 308 digits") from error


def _array(found: Numbers, what: str) -> np.ndarray:
    try:
        return found.array()
    # A storage within a pickle is opened only now, and can fail as any file does.
    except Exception as error:
        raise InputError(f"{what} cannot be read: {error or type(error).__name__}") from error


def _name(value: object) -> str:
    return "a tensor or an array" if isinstance(value, Numbers) else f"a {type(value).__name__}"
