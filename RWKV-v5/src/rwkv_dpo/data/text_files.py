"""Files of text, also as .gz: unpacked within bounds, decoded, line by line. UTF-8, with or without a byte order mark."""

import codecs
import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.files.kinds import Kind, refuse_others

Row = dict[str, Any]


OnFault = Callable[[InputError], None]


ROW_ENDINGS = (".json", ".jsonl", ".parquet", ".csv")


# All but what comes in a file's place when a download goes wrong.
_FILES = frozenset(Kind) - {Kind.LFS_POINTER, Kind.WEB_PAGE}


BLOCK = 1 << 20


# Text packs some 3 to 20 times. Beyond this ratio a .gz is made to fill a memory or a disk, and no line of it need ever end.
LARGEST_RATIO = 200


ALWAYS_UNPACKED = 16 << 20


_BYTE_ORDER_MARK = "\ufeff"


def stop(fault: InputError) -> NoReturn:
    """The strict answer to a faulty row."""
    raise fault


def ending(path: str | Path) -> str:
    """What kind of file it is, by its name: ".jsonl" of "a.JSONL" and of "a.jsonl.gz"."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def open_lines(path: str | Path, on_fault: OnFault = stop) -> Iterator[tuple[str, str]]:
    """("line 7", text) of every line, its "\\n" included; only "\\n" ends a line. A line that is not UTF-8 goes to `on_fault`."""
    with opened(Path(path)) as file:
        for i, line in enumerate(file, start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                on_fault(InputError(f"{path}: line {i}: not UTF-8: {error.reason} at its byte {error.start}"))
            else:
                yield f"line {i}", text.removeprefix(_BYTE_ORDER_MARK) if i == 1 else text


def read_text(path: str | Path) -> str:
    """The whole text of a file; every form of line end becomes "\\n"."""
    return "".join(text_blocks(Path(path)))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked; faults in reading them become InputError."""
    refuse_others(path, f"a {ending(path)} file", _FILES if ending(path) in ROW_ENDINGS else _FILES | {Kind.WEB_PAGE})
    try:
        with open(path, "rb") as file:
            yield io.BufferedReader(_Unpacked(file, path), BLOCK) if path.suffix.lower() == ".gz" else file  # type: ignore[misc]
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole .gz file: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Unpacked(io.RawIOBase):
    """The content of a .gz file. InputError once it is more than LARGEST_RATIO times the file."""

    def __init__(self, packed: BinaryIO, path: Path) -> None:
        self._file, self._path = gzip.GzipFile(fileobj=packed, mode="rb"), path
        self._room = ALWAYS_UNPACKED + LARGEST_RATIO * os.fstat(packed.fileno()).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.readinto(buffer)
        self._room -= n
        return n if self._room >= 0 else refuse(f"{self._path}: unpacks to more than {LARGEST_RATIO} times its size")


def text_blocks(path: Path) -> Iterator[str]:
    """The text of a file in parts of about a megabyte; every form of line end becomes "\\n"."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    n_read, is_first = 0, True
    with opened(path) as file:
        while True:
            block = file.read(BLOCK)
            n_pending = len(utf8.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = n_read - n_pending + error.start
                raise InputError(f"{path}: not UTF-8: {error.reason} at byte {at}") from error
            n_read += len(block)
            if text:
                yield text.removeprefix(_BYTE_ORDER_MARK) if is_first else text
                is_first = False
            if not block:
                return
