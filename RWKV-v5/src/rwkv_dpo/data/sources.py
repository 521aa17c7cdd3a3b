"""Preferences from what users have: files of rows, folders and globs of them, and Hub data sets."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.files import expand, open_rows
from rwkv_dpo.data.forms import FORMS, Dropped, Preference, to_preference
from rwkv_dpo.data.hub import is_hub_id, open_hub_rows
from rwkv_dpo.data.text_files import ROW_ENDINGS, Row, stop

FORMATS = ("auto", *FORMS)
ON_ERROR = ("stop", "skip")


def read_preferences(
    source: str | Path, limit: int = 0, split: str = "", form: str = "auto", on_error: str = "stop"
) -> Iterator[Preference | Dropped]:
    """What the rows of `source` hold, one after the other as they are asked for; at most `limit` rows when it is not 0.

    source: a .json, .jsonl, .parquet or .csv file, each also as .gz, a folder or a glob of those, or a Hub id, of which `split`
    ("train" when empty) is read. `form`: one of FORMATS. A malformed row is an InputError that names file, row and field, or with
    `on_error` "skip" one that is Dropped; any other fault is always an InputError.
    """
    read = _read(source, split, form, on_error == "skip")
    return itertools.islice(read, limit) if limit else read


def _read(source: str | Path, split: str, form: str, is_skipping: bool) -> Iterator[Preference | Dropped]:
    faults: list[InputError] = []
    for place, where, row in _placed_rows(source, split, faults if is_skipping else None):
        yield from _emptied(faults)
        try:
            read = to_preference(row, where, form)
        except InputError as error:
            fault = InputError(f"{place}: {error}")
            if not is_skipping:
                raise fault from error
            faults.append(fault)
        else:
            yield read
    yield from _emptied(faults)


def _placed_rows(source: str | Path, split: str, faults: list[InputError] | None) -> Iterator[tuple[str, str, Row]]:
    """(place for errors, place for reports, row) of every row. Rows that cannot be read are put into `faults`, or stop the reading
    when that is None."""
    if is_hub_id(source, ROW_ENDINGS):
        yield from ((f"{source}: {where}", where, row) for where, row in open_hub_rows(str(source), split or "train"))
        return
    if split:
        refuse(f"--split {split}: {source} is read from files, which have no splits")
    paths = expand(source)
    for path in paths:
        for where, row in open_rows(path, stop if faults is None else faults.append):
            yield f"{path}: {where}", where if len(paths) == 1 else f"{path.name}: {where}", row


def _emptied(faults: list[InputError]) -> Iterator[Dropped]:
    while faults:
        yield Dropped(str(faults.pop(0)), "malformed")
