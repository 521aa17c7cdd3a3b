"""Files of rows (.json, .jsonl, .parquet, .csv) and of text, each also as .gz: found by name, read as a stream.

A fault is one InputError that names the file and the row (counted from 1) or line. Text is UTF-8, with or without a byte order
mark.
"""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.row_readers import ROW_READERS
from rwkv_dpo.data.text_files import ROW_ENDINGS, OnFault, Row, ending, stop


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
    for where, row in ROW_READERS[ending(path)](path, on_fault):
        if isinstance(row, dict):
            yield where, row
        else:
            on_fault(InputError(f"{path}: {where}: is a {type(row).__name__}; expected an object with named fields"))


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


