"""Which reader a file of rows is read with: its first bytes say so, and where they say nothing, its name."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.arrow_rows import ARROW_FILE, PARQUET, arrow_rows, parquet_rows
from rwkv_dpo.data.json_rows import json_rows
from rwkv_dpo.data.table_rows import table_rows
from rwkv_dpo.data.text_files import ROW_ENDINGS, Reading, ending, opened

RowReader = Callable[[Path, Reading], Iterator[tuple[str, Any]]]


_BY_CONTENT: tuple[tuple[bytes, RowReader], ...] = ((PARQUET, parquet_rows), (ARROW_FILE, arrow_rows))
_BY_NAME: dict[str, RowReader] = dict(
    zip(ROW_ENDINGS, (json_rows, json_rows, json_rows, parquet_rows, arrow_rows, table_rows, table_rows), strict=True)
)


def reader_of(path: Path) -> RowReader:
    """The reader for that file. InputError for a name of another kind, and for what came in a file's place."""
    if ending(path) not in ROW_ENDINGS:
        refuse(f"{path}: rows are read from {', '.join(ROW_ENDINGS)} files, also packed (.gz, .zst, .bz2, .xz)")
    with opened(path) as file:
        head = file.peek(len(ARROW_FILE))  # type: ignore[attr-defined]  # both kinds of file of `opened` have it
    return next((reader for start, reader in _BY_CONTENT if head.startswith(start)), _BY_NAME[ending(path)])
