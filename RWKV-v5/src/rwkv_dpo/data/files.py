"""Files of rows (.json, .jsonl, .parquet, .csv) and of text, each also as .gz: found by name, read as a stream.

A fault is one InputError that names the file and the row (counted from 1) or line. Text is UTF-8, with or without a byte order
mark.
"""

import codecs
import contextlib
import csv
import glob
import gzip
import io
import json
import os
import re
import shutil
import tempfile
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
_BLOCK = 1 << 20
# Text packs some 3 to 20 times. Beyond this ratio a .gz is made to fill a memory or a disk, and no line of it need ever end.
_LARGEST_RATIO = 200
_ALWAYS_UNPACKED = 16 << 20
_BYTE_ORDER_MARK = "\ufeff"
_JSON_SPACE = re.compile(r"[ \t\r\n]*")
_decode_json = json.JSONDecoder().raw_decode


def stop(fault: InputError) -> NoReturn:
    """The strict answer to a faulty row."""
    raise fault


def ending(path: str | Path) -> str:
    """What kind of file it is, by its name: ".jsonl" of "a.JSONL" and of "a.jsonl.gz"."""
    return Path(Path(path).name.lower().removesuffix(".gz")).suffix


def expand(pattern: str | Path, endings: tuple[str, ...] = ROW_ENDINGS) -> list[Path]:
    """The files that `pattern` names, sorted: one file, what a glob finds ("**" for any depth), or all files in a folder, at any
    depth, with one of the endings. InputError when there are none."""
    path = Path(pattern)
    if os.path.isdir(path):
        found = [one for one in path.rglob("*") if os.path.isfile(one) and ending(one) in endings and not one.name.startswith(".")]
        return sorted(found) or refuse(f"{pattern}: no {', '.join(endings)} file in this folder")
    if os.path.exists(path) or not glob.has_magic(str(pattern)):
        return [path] if os.path.exists(path) else refuse(f"{pattern}: cannot be read: No such file or directory")
    matches = [Path(name) for name in glob.glob(str(pattern), recursive=True)]
    return sorted(one for one in matches if os.path.isfile(one)) or refuse(f"{pattern}: matches no file")


def open_rows(path: str | Path, on_fault: OnFault = stop) -> Iterator[tuple[str, Row]]:
    """("row 3" or "line 7", row) of every row, read as it is asked for: a line of .jsonl, an object in the one array of .json, a
    row of .parquet or .csv (its texts named by the first line).

    A file that cannot be read on is an InputError. A row that is faulty by itself (a line that is not JSON, a row with too many
    fields) goes to `on_fault`, and is left out if that returns.
    """
    path = Path(path)
    if ending(path) not in ROW_ENDINGS:
        refuse(f"{path}: rows are read from {', '.join(ROW_ENDINGS)} files, also with .gz")
    for where, row in _ROW_READERS[ending(path)](path, on_fault):
        if isinstance(row, dict):
            yield where, row
        else:
            on_fault(InputError(f"{path}: {where}: is a {type(row).__name__}; expected an object with named fields"))


def open_lines(path: str | Path, on_fault: OnFault = stop) -> Iterator[tuple[str, str]]:
    """("line 7", text) of every line, its "\\n" included; only "\\n" ends a line. A line that is not UTF-8 goes to `on_fault`."""
    with _opened(Path(path)) as file:
        for i, line in enumerate(file, start=1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                on_fault(InputError(f"{path}: line {i}: not UTF-8: {error.reason} at its byte {error.start}"))
            else:
                yield f"line {i}", text.removeprefix(_BYTE_ORDER_MARK) if i == 1 else text


def read_text(path: str | Path) -> str:
    """The whole text of a file; every form of line end becomes "\\n"."""
    return "".join(_text_blocks(Path(path)))


def text_field(row: Row, field: str, source: str) -> str:
    """The text in that field. InputError, naming `source`, when there is none or it cannot be written as UTF-8."""
    if field not in row:
        refuse(f"{source}: no field '{field}', found {', '.join(map(repr, row)) or 'none'}")
    text = row[field]
    if not isinstance(text, str):
        refuse(f"{source}: field '{field}' is a {type(text).__name__}; expected text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{source}: field '{field}' has a lone surrogate at character {error.start}") from error
    return text


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked; faults in reading them become InputError."""
    refuse_others(path, f"a {ending(path)} file", _FILES if ending(path) in ROW_ENDINGS else _FILES | {Kind.WEB_PAGE})
    try:
        with open(path, "rb") as file:
            yield io.BufferedReader(_Unpacked(file, path), _BLOCK) if path.suffix.lower() == ".gz" else file  # type: ignore[misc]
    except (EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole .gz file: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Unpacked(io.RawIOBase):
    """The content of a .gz file. InputError once it is more than _LARGEST_RATIO times the file."""

    def __init__(self, packed: BinaryIO, path: Path) -> None:
        self._file, self._path = gzip.GzipFile(fileobj=packed, mode="rb"), path
        self._room = _ALWAYS_UNPACKED + _LARGEST_RATIO * os.fstat(packed.fileno()).st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.readinto(buffer)
        self._room -= n
        return n if self._room >= 0 else refuse(f"{self._path}: unpacks to more than {_LARGEST_RATIO} times its size")


def _text_blocks(path: Path) -> Iterator[str]:
    utf8 = codecs.getincrementaldecoder("utf-8")()
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    n_read, is_first = 0, True
    with _opened(path) as file:
        while True:
            block = file.read(_BLOCK)
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


def _jsonl_rows(path: Path, on_fault: OnFault) -> Iterator[tuple[str, Any]]:
    for where, line in open_lines(path, on_fault):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            on_fault(InputError(f"{path}: {where}: not JSON: {error}"))
        else:
            yield where, row


def _json_rows(path: Path, on_fault: OnFault) -> Iterator[tuple[str, Any]]:
    text = _JsonStream(_text_blocks(path))
    if (first := text.take()) != "[":
        found = f"begins with {first!r}" if first else "is empty"
        refuse(f"{path}: {found}; expected one array of rows (a file of one object a line is called .jsonl)")
    mark = text.take() if text.peek() == "]" else ","
    n = 0
    while mark == ",":
        n += 1
        try:
            row = text.value()
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: row {n}: not JSON: {getattr(error, 'msg', error)}") from error
        yield f"row {n}", row
        mark = text.take()
    if mark != "]":
        refuse(f"{path}: row {n}: not JSON: {mark or 'the end of the file'!r} follows it; expected ',' or ']'")
    if rest := text.peek():
        refuse(f"{path}: not JSON: {rest!r} follows the array")


class _JsonStream:
    """JSON text that comes in blocks; holds no more than the value it is at and a block."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks, self._text, self._at = blocks, "", 0

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            space = _JSON_SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or not self._read(1):
                return self._text[self._at : self._at + 1]

    def take(self) -> str:
        mark = self.peek()
        self._at += len(mark)
        return mark

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, self._at = _decode_json(self._text, self._at)
                return value
            except json.JSONDecodeError:
                # Cut off, perhaps: try with twice the text, so that a value of any size is tried a few times only.
                if not self._read(len(self._text) - self._at):
                    raise

    def _read(self, n: int) -> bool:
        added = []
        while n > 0 and (block := next(self._blocks, None)) is not None:
            added.append(block)
            n -= len(block)
        self._text, self._at = "".join([self._text[self._at :], *added]), 0
        return bool(added)


def _csv_rows(path: Path, on_fault: OnFault) -> Iterator[tuple[str, Any]]:
    # The limit is the whole process's, and by default 128 KB a field.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader((line for _, line in open_lines(path)), strict=True)
    i = 0
    try:
        names = next(rows, [])
        if not names or len(set(names)) < len(names):
            refuse(f"{path}: line 1: expected the names of the fields, each once, found {', '.join(map(repr, names)) or 'none'}")
        for i, row in enumerate(filter(None, rows), start=1):
            if len(row) == len(names):
                yield f"row {i}", dict(zip(names, row, strict=True))
            else:
                on_fault(InputError(f"{path}: row {i}: {len(row)} fields; the first line names {len(names)}"))
    except csv.Error as error:
        raise InputError(f"{path}: row {i + 1}: not CSV: {error}") from error


def _parquet_rows(path: Path, on_fault: OnFault) -> Iterator[tuple[str, Any]]:
    # Here, not above: it takes a while to import, and most files are not parquet.
    from pyarrow import parquet

    n = 0
    with _opened(path) as packed, tempfile.TemporaryFile() as unpacked:
        file = packed
        if path.suffix.lower() == ".gz":
            # Parquet is read from its end, where a .gz cannot begin.
            shutil.copyfileobj(packed, unpacked, _BLOCK)
            file = unpacked  # type: ignore[assignment]
        try:
            table = parquet.ParquetFile(file)
            # Not column by column: of a broken column's facts pyarrow ends the whole process.
            unpacked_size = sum(max(table.metadata.row_group(i).total_byte_size, 0) for i in range(table.num_row_groups))
            if unpacked_size > _ALWAYS_UNPACKED + _LARGEST_RATIO * path.stat().st_size:
                raise ValueError(f"it unpacks to {unpacked_size} bytes, more than {_LARGEST_RATIO} times its size")
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    n += 1
                    yield f"row {n}", row
        # pyarrow, and the Python objects that it makes of dates and decimals, promise no particular exception.
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{path}: not a whole .parquet file, after row {n}: {reason}") from error


_ROW_READERS = dict(zip(ROW_ENDINGS, (_json_rows, _jsonl_rows, _parquet_rows, _csv_rows), strict=True))
