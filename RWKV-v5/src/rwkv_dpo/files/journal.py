"""What a long computation has finished so far, in a file that survives being killed at any point.

    .journal: the fingerprint of what is computed (32 bytes), then records of uint32 length, uint32 CRC-32, payload; little-endian

Records are only ever appended, each on the disk before the next begins, so that an incomplete one can only be the last.
"""

import contextlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.files.locks import try_lock

_RECORD = struct.Struct("<II")


class Journal:
    """`records`: the payloads that are on the disk, in the order of their appending."""

    def __init__(self, path: str | Path, file: BinaryIO, records: list[bytes]) -> None:
        self._path, self._file, self.records = path, file, records

    def append(self, payload: bytes) -> None:
        """InputError when the disk is full."""
        with _told(self._path):
            _write(self._file, _RECORD.pack(len(payload), zlib.crc32(payload)) + payload)
            os.fsync(self._file.fileno())
        self.records.append(payload)


@contextlib.contextmanager
def open_journal(path: str | Path, fingerprint: bytes) -> Iterator[Journal]:
    """The journal in that file, which one process at a time may hold. A file with another fingerprint, or none, is started again; an
    incomplete record at the end is cut off. InputError when it is held by another process or cannot be written to."""
    with _told(path):
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by the next block
    with file:
        with _told(path):
            if not try_lock(file.fileno()):
                refuse(f"{path}: another process is at work on it")
            file.seek(0)
            records, end = _whole_records(file.read(), fingerprint)
            file.truncate(end)
            if not end:
                _write(file, fingerprint)
        yield Journal(path, file, records)  # type: ignore[arg-type]  # without a buffer, a BinaryIO too


def _write(file: BinaryIO, content: bytes) -> None:
    # Without a buffer a write may take a part only, on a disk that is nearly full.
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


@contextlib.contextmanager
def _told(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _whole_records(content: bytes, fingerprint: bytes) -> tuple[list[bytes], int]:
    """The records up to the first incomplete one, and where that begins; nothing and 0 in a file with another fingerprint."""
    if content[: len(fingerprint)] != fingerprint:
        return [], 0
    records, end = [], len(fingerprint)
    while len(content) - end >= _RECORD.size:
        size, crc = _RECORD.unpack_from(content, end)
        payload = content[end + _RECORD.size : end + _RECORD.size + size]
        if len(payload) < size or zlib.crc32(payload) != crc:
            break
        records.append(payload)
        end += _RECORD.size + size
    return records, end
