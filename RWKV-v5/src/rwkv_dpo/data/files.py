"""Files of rows (.json, .jsonl, .ndjson, .parquet, .arrow, .csv, .tsv) and of text, also compressed: found by name, read as a stream. An
error is one InputError that names the file and the row (counted from 1) or line."""

import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.arrow_rows import ARROW_FILE, PARQUET, arrow_rows, parquet_rows
from rwkv_dpo.data.json_rows import json_rows
from rwkv_dpo.data.table_rows import table_rows
from rwkv_dpo.data.text_files import ROW_ENDINGS, OnFault, Reading, Row, ending, opened, stop

RowReader = Callable[[Path, Reading], Iterator[tuple[str, Any]]]
_BY_CONTENT: tuple[tuple[bytes, RowReader], ...] = ((PARQUET, parquet_rows), (ARROW_FILE, arrow_rows))
_BY_NAME: dict[str, RowReader] = dict(
    zip(ROW_ENDINGS, (json_rows, json_rows, json_rows, parquet_rows, arrow_rows, table_rows, table_rows), strict=True)
)
# Files that `datasets` and the Hub keep next to the rows of a data set.
_METADATA = frozenset(("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "croissant.json"))


def expand(pattern: str | Path, endings: tuple[str, ...] = ROW_ENDINGS) -> list[Path]:
    """The files that `pattern` names, sorted: one file, the matches of a glob ("**" for any depth), or all files with one of the endings in
    a folder, at any depth, as a clone from the Hub or `datasets.save_to_disk` leaves them: without hidden files, metadata and the caches of
    `datasets`. InputError if there are none."""
    path = Path(pattern)
    if os.path.isdir(path):
        found = [one for one in path.rglob("*") if ending(one) in endings and os.path.isfile(one) and _holds_rows(one, path)]
        return sorted(found) or refuse(f"{pattern}: no {', '.join(endings)} file in this folder")
    if os.path.exists(path) or not glob.has_magic(str(pattern)):
        return [path] if os.path.exists(path) else refuse(f"{pattern}: cannot be read: No such file or directory")
    matches = [Path(name) for name in glob.glob(str(pattern), recursive=True)]
    return sorted(one for one in matches if os.path.isfile(one)) or refuse(f"{pattern}: matches no file")


def of_split(paths: list[Path], folder: Path, split: str) -> list[Path]:
    """Those that belong to a split, by the name of a folder below `folder`, or by the beginning of their own: train/a.parquet,
    train-00000-of-00002.parquet, train.jsonl."""
    begins = re.compile(rf"{re.escape(split)}(?![A-Za-z0-9_])")
    return [path for path in paths if split in path.relative_to(folder).parts[:-1] or begins.match(path.name)]


def open_rows(path: str | Path, on_fault: OnFault = stop, encoding: str = "utf-8", split: str = "") -> Iterator[tuple[str, Row]]:
    """("row 3" or "line 7", row) for every row, read lazily: a line or an object of JSON, a row of .parquet or .arrow, or a row of a table,
    whose first line has the names. `encoding`: of texts without a byte order mark; `split`: the one to read from a JSON file that holds
    several. A file that cannot be read any further is an InputError. A row that is faulty on its own (a line that is not JSON, a row with
    too many fields) goes to `on_fault`, and is skipped if that returns.
    """
    path = Path(path)
    reader = reader_of(path)
    if split and reader is not json_rows:
        refuse(f"--split {split}: {path} has no splits")
    for where, row in reader(path, Reading(on_fault, encoding, split)):
        if isinstance(row, dict):
            yield where, row
        else:
            on_fault(InputError(f"{path}: {where}: is a {type(row).__name__}; expected an object with named fields"))


def text_field(row: Row, field: str, source: str) -> str:
    """The text in that field. InputError, naming `source`, if there is none or it cannot be written as UTF-8."""
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


def _holds_rows(path: Path, folder: Path) -> bool:
    is_cache = path.name.startswith(("cache-", "tmp")) and ending(path) == ".arrow"
    is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not (is_hidden or is_cache or path.name in _METADATA)


def reader_of(path: Path) -> RowReader:
    """The reader for that file. InputError for a name of another kind, or if the content is not what a file of that name should have."""
    if ending(path) not in ROW_ENDINGS:
        refuse(f"{path}: rows are read from {', '.join(ROW_ENDINGS)} files, also compressed (.gz, .zst, .bz2, .xz)")
    with opened(path) as file:
        head = file.peek(len(ARROW_FILE))  # type: ignore[attr-defined]  # both kinds of file of `opened` have it
    return next((reader for start, reader in _BY_CONTENT if head.startswith(start)), _BY_NAME[ending(path)])
