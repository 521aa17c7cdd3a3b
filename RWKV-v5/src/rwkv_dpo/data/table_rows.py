"""Rows out of tables as text, .csv and .tsv: fields apart by commas, semicolons, tabs or bars, quotes doubled or after a backslash."""

import csv
import io
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.messages import unprinted
from rwkv_dpo.data.text_files import Reading, beginning, ending, open_lines

# Rows that tell how a table is written.
_LOOKED_AT = 200
_DELIMITERS = {".tsv": "\t,;|", ".csv": ",;\t|"}
# As Excel tells itself what parts the fields.
_TOLD = re.compile(r"sep=(.)\r?\n?")


def table_rows(path: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
    """("row 7", {name: text}) of every row after the first, which names the fields. A text that is a printed list of messages becomes
    that list."""
    # The limit is the whole process's, and by default 128 KB a field.
    csv.field_size_limit(2**31 - 1)
    dialect = _dialect(path, reading.encoding)
    lines = (line for _, line in open_lines(path, encoding=reading.encoding))
    first = next(lines, "")
    rows = csv.reader(lines if _TOLD.fullmatch(first) else itertools.chain([first], lines), strict=True, **dialect)
    n_told = 1 if _TOLD.fullmatch(first) else 0
    i = 0
    try:
        names = next(rows, [])
        if not names or len(set(names)) < len(names):
            refuse(f"{path}: line 1: expected the names of the fields, each once, found {', '.join(map(repr, names)) or 'none'}")
        for i, row in enumerate(filter(None, rows), start=1):
            if len(row) != len(names):
                found = f"{len(row)} fields; the first line names {len(names)} (parted by {dialect['delimiter']!r}"
                reading.on_fault(InputError(f"{path}: row {i}: {found}; line {n_told + rows.line_num})"))
                continue
            try:
                read = {name: unprinted(text, name) for name, text in zip(names, row, strict=True)}
            except InputError as error:
                reading.on_fault(InputError(f"{path}: row {i}: {error} (line {n_told + rows.line_num})"))
            else:
                yield f"row {i}", read
    except csv.Error as error:
        raise InputError(f"{path}: row {i + 1}: not CSV: {error} (line {n_told + rows.line_num})") from error


def _dialect(path: Path, encoding: str) -> dict[str, Any]:
    """The way of writing tables in which most of the first rows have as many fields as the first line names, more than one; where that
    is none, the usual one of the file's kind."""
    head, is_whole = beginning(path, encoding)
    told = _TOLD.match(head)
    marks = told[1] if told else _DELIMITERS[ending(path)]
    quotes = ({"doublequote": True}, {"doublequote": False, "escapechar": "\\"})
    ways: list[dict[str, Any]] = [{"delimiter": mark, **quoted} for mark in marks for quoted in quotes]
    fitting = [_share_that_fits(head[told.end() if told else 0 :], is_whole, way) for way in ways]
    return ways[fitting.index(max(fitting))] if max(fitting) > 0.5 else ways[0]


def _share_that_fits(head: str, is_whole: bool, way: dict[str, Any]) -> float:
    sizes = []
    try:
        # Lines end with "\n" alone, not with the other characters at which str.splitlines parts them.
        for row in itertools.islice(filter(None, csv.reader(io.StringIO(head), strict=True, **way)), _LOOKED_AT):
            sizes.append(len(row))
    except csv.Error:
        # The head may end within a text.
        if is_whole:
            return 0
    n_named, *sizes = (sizes if is_whole or len(sizes) == _LOOKED_AT else sizes[:-1]) or [1]
    return sizes.count(n_named) / len(sizes) if n_named > 1 and sizes else 0.6 * (n_named > 1)
