"""Pair files (*.save): our packed form, read within the bounds that its bytes set, and the original's list.

The packed form has two versions. Version 1 holds pairs that are trees of their own, without scores: three rows a pair, in their order.
Version 2 holds the rest, and is only written where version 1 can't say it, so that programs that know no other read what they can.
"""

import io
import json
import math
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.original_pairs import read_original, write_original
from rwkv_dpo.data.pairs import PairSet, check_pairs, pack_pairs, plain_pairs
from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.files.kinds import Kind, kind_of, refuse_others

FORMAT = "rwkv_dpo pairs"
_Version = tuple[tuple[str, ...], Callable[..., PairSet]]  # its arrays, and what makes pairs of them
_UNKNOWN: _Version = ((), PairSet)
_VERSIONS: dict[int, _Version] = {
    1: (("tokens", "offsets", "ref_logps"), plain_pairs),
    2: (("tokens", "offsets", "rows", "trees", "scores", "ref_logps"), PairSet),
}


def load_pairs(path: str | Path, vocab_size: int | None = None) -> PairSet:
    """Read a pair file of either form and check every row; token ids against vocab_size too where it is given.

    InputError: no such file, truncated, not pairs, carries code, or a row (counted from 1) that cannot be trained on.
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
    version = 1 if pairs.is_plain else 2
    header = {**pairs.header, "format": FORMAT, "version": version, "n_pairs": len(pairs)}
    encoded = np.frombuffer(as_json(header, sort_keys=True).encode(), dtype=np.uint8)
    np.savez(file, header=encoded, **{name: getattr(pairs, name) for name in _VERSIONS[version][0]})


def save_original(path: str | Path, pairs: PairSet) -> None:
    """Write the original's form, atomically. It has no place for the header, nor for pairs without reference scores."""
    if not pairs.is_scored:
        refuse(f"{path}: the original's form needs reference log-probabilities, and these pairs have none")
    with atomic_write(path) as file:
        write_as_original(file, pairs)


def write_as_original(file: BinaryIO, pairs: PairSet) -> None:
    """The scored pairs as torch.save writes a list of them."""
    write_original(file, [(*(row.tolist() for row in pairs.pair(i)), *pairs.ref_logps[i].tolist()) for i in range(len(pairs))])


def _read_packed(path: Path) -> PairSet:
    try:
        with zipfile.ZipFile(path) as archive:
            header = json.loads(_member(archive, "header", path.stat().st_size).tobytes())
            names, make = _VERSIONS.get(header.get("version", 0), _UNKNOWN) if isinstance(header, dict) else _UNKNOWN
            arrays = {name: _member(archive, name, path.stat().st_size) for name in names}
    # A damaged archive can fail anywhere in zipfile, zlib, numpy's header or JSON, and they promise no particular exception.
    except Exception as error:
        raise InputError(f"{path}: not an intact pair file: {error or type(error).__name__}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        refuse(f"{path}: not a pair file: its header does not say {FORMAT!r}")
    if not arrays:
        refuse(f"{path}: pair format version {header.get('version')}; versions {' and '.join(map(str, _VERSIONS))} are known")
    if not all(array.ndim for array in arrays.values()) or not _is_packed_well(pairs := make(**arrays)):
        refuse(f"{path}: not a pair file: its arrays disagree with each other")
    return replace(pairs, header=header)


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
    offsets, rows, trees, n = pairs.offsets, pairs.rows, pairs.trees, len(pairs.ref_logps)
    if (pairs.tokens.dtype, pairs.tokens.ndim) != (np.int32, 1):
        return False
    if any(array.dtype != np.int64 for array in (offsets, rows, trees)):
        return False
    if not pairs.scores.dtype == pairs.ref_logps.dtype == np.float64:
        return False
    return (
        offsets.ndim == trees.ndim == 1
        and rows.shape == (n, 3)
        and pairs.scores.shape == pairs.ref_logps.shape == (n, 2)
        and _are_bounds(offsets, len(pairs.tokens))
        and _are_bounds(trees, n)
        # Every row is of use, and either a prompt or an answer.
        and np.array_equal(np.unique(rows), np.arange(len(offsets) - 1))
        and not np.isin(rows[:, 0], rows[:, 1:]).any()
        and bool((trees[1:] > trees[:-1]).all())
        and not np.isinf(pairs.scores).any()
    )


def _are_bounds(bounds: np.ndarray, end: int) -> bool:
    # Not by their differences, which wrap around.
    return bool(len(bounds)) and bounds[0] == 0 and bounds[-1] == end and bool((bounds[1:] >= bounds[:-1]).all())
