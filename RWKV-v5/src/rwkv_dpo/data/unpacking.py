"""Files as bytes, unpacked within bounds: .gz, .zst, .bz2 and .xz, told by their first bytes, whatever they are called."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.base.libraries import check_package

BLOCK = 1 << 20
# Of a file's beginning, by which it is told what it is. Larger reads go past this buffer.
BEGINNING = 1 << 15
# Text packs some 3 to 20 times. Beyond this ratio a file is made to fill a memory or a disk, and no line of it need ever end.
LARGEST_RATIO = 200
ALWAYS_UNPACKED = 16 << 20
PACK_ENDINGS = (".gz", ".zst", ".bz2", ".xz")
# xz -9 takes 65 MB to unpack; a file may ask for 4 GB.
_XZ_MEMORY = 256 << 20


def unpacked_name(path: str | Path) -> str:
    """The file's name without .gz or a similar ending: "a.jsonl" of "b/a.jsonl.gz"."""
    name = Path(path).name
    packed = next((end for end in PACK_ENDINGS if name.lower().endswith(end)), "")
    return name[: len(name) - len(packed)]


def _pack_of(head: bytes) -> tuple[str, Any]:
    """The kind of pack that begins so, and what unpacks it; "" and None for none."""
    return next(((name, unpack) for name, start, unpack in _PACKS if start.match(head)), ("", None))


@contextlib.contextmanager
def opened_bytes(path: Path) -> Iterator[BinaryIO]:
    """The file's content, unpacked when it is packed; faults in reading it become InputError. Its `peek` shows up to BEGINNING bytes."""
    kind = ""
    try:
        with open(path, "rb", buffering=BEGINNING) as file:
            kind, unpack = _pack_of(file.peek())  # type: ignore[attr-defined]  # a BufferedReader has it
            content = _Bounded(unpack(file), path) if unpack else None
            yield io.BufferedReader(content, BEGINNING) if content else file  # type: ignore[misc]
    # pyarrow's and lzma's errors for what is no whole pack are OSErrors too, without a number.
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: not an intact .{kind} file: {error}") from error
    except OSError as error:
        if kind and error.errno is None:
            raise InputError(f"{path}: not an intact .{kind} file: {error}") from error
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Bounded(io.RawIOBase):
    """What `source` reads. InputError once it is more than LARGEST_RATIO times the file."""

    def __init__(self, source: Any, path: Path) -> None:
        self._source, self._path = source, path
        self._room = ALWAYS_UNPACKED + LARGEST_RATIO * os.path.getsize(path)

    def readable(self) -> bool:
        """It is there to be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, as far as the content goes."""
        n = 0
        while n < len(buffer) and (block := self._source.read(len(buffer) - n)):
            buffer[n : n + len(block)] = block
            n += len(block)
        self._room -= n
        return n if self._room >= 0 else refuse(f"{self._path}: unpacks to more than {LARGEST_RATIO} times its size")


class _Stream:
    """Packs one after the other, as bzip2 and xz write them, through Python's decompressors."""

    def __init__(self, packed: BinaryIO, new: Callable[[], Any]) -> None:
        self._packed, self._new, self._decompressor = packed, new, new()

    def read(self, n: int) -> bytes:
        """Up to n bytes; none at the end."""
        while True:
            block = b""
            if self._decompressor.eof:
                # xz pads its packs with zeros.
                block = (self._decompressor.unused_data or self._packed.read(BLOCK)).lstrip(b"\0")
                if not block:
                    if self._packed.read(1):
                        raise EOFError("zeros within it")
                    return b""
                self._decompressor = self._new()
            elif self._decompressor.needs_input and not (block := self._packed.read(BLOCK)):
                raise EOFError("it ends too early")
            if unpacked := self._decompressor.decompress(block, n):
                return unpacked


def _zstd(packed: BinaryIO) -> Any:
    check_package("pyarrow", "a .zst file")
    # Here, not above: it takes a while to import. Python's own library has zstd from 3.14 on.
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd")


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


_PACKS: tuple[tuple[str, re.Pattern[bytes], Callable[[BinaryIO], Any]], ...] = (
    ("gz", re.compile(rb"\x1f\x8b"), lambda packed: gzip.GzipFile(fileobj=packed, mode="rb")),
    ("zst", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _zstd),
    ("bz2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), lambda packed: _Stream(packed, bz2.BZ2Decompressor)),
    ("xz", re.compile(rb"\xfd7zXZ\0"), lambda packed: _Stream(packed, _xz)),
)
