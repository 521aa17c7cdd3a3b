"""Pair files (*.save): our packed form, read within the bounds that its bytes set, and the original's list."""

import io
import json
import math
import os
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.original_pairs import read_original, write_original
from rwkv_dpo.data.pairs import FORMAT, VERSION, PairSet, check_pairs, pack_pairs
from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.files.kinds import Kind, kind_of, refuse_others


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
