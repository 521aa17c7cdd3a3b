"""Rows out of .json, .jsonl, .parquet and .csv files, read as they are asked for. A fault names the file and the row or line."""

import csv
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.text_files import ALWAYS_UNPACKED, BLOCK, LARGEST_RATIO, ROW_ENDINGS, OnFault, open_lines, opened, text_blocks

_JSON_SPACE = re.compile(r"[ \t\r\n]*")


_decode_json = json.JSONDecoder().raw_decode


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
    text = _JsonStream(text_blocks(path))
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
    with opened(path) as packed, tempfile.TemporaryFile() as unpacked:
        file = packed
        if path.suffix.lower() == ".gz":
            # Parquet is read from its end, where a .gz cannot begin.
            shutil.copyfileobj(packed, unpacked, BLOCK)
            file = unpacked  # type: ignore[assignment]
        try:
            table = parquet.ParquetFile(file)
            # Not column by column: of a broken column's facts pyarrow ends the whole process.
            unpacked_size = sum(max(table.metadata.row_group(i).total_byte_size, 0) for i in range(table.num_row_groups))
            if unpacked_size > ALWAYS_UNPACKED + LARGEST_RATIO * path.stat().st_size:
                raise ValueError(f"it unpacks to {unpacked_size} bytes, more than {LARGEST_RATIO} times its size")
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    n += 1
                    yield f"row {n}", row
        # pyarrow, and the Python objects that it makes of dates and decimals, promise no particular exception.
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"{path}: not a whole .parquet file, after row {n}: {reason}") from error


ROW_READERS = dict(zip(ROW_ENDINGS, (_json_rows, _jsonl_rows, _parquet_rows, _csv_rows), strict=True))
