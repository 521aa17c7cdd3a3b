"""Preferences from what users have: files of rows, folders and globs of them, and Hub data sets."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.files import expand, of_split, open_rows
from rwkv_dpo.data.forms import FORMS, Dropped, Preference, to_preference
from rwkv_dpo.data.hub import is_hub_id, open_hub_rows
from rwkv_dpo.data.text_files import ROW_ENDINGS, Reading, Row, stop

FORMATS = ("auto", *FORMS)
ON_ERROR = ("stop", "skip")


def read_preferences(
    source: str | Path, limit: int = 0, split: str = "", form: str = "auto", on_error: str = "stop", *, encoding: str = "utf-8"
) -> Iterator[Preference | Dropped]:
    """What the rows of `source` hold, one after the other as they are asked for; at most `limit` rows when it is not 0.

    source: a file of rows (files.open_rows), also packed, a folder or a glob of those, or a Hub id. `split`: the one that is read of a
    Hub data set ("train" when empty), and of a folder or a file that holds several (all when empty). `form`: one of FORMATS.
    A malformed row is an InputError that names file, row and field, or with `on_error` "skip" one that is Dropped; any other fault is
    always an InputError.
    """
    read = _read(source, split, form, on_error == "skip", encoding)
    return itertools.islice(read, limit) if limit else read


def _read(source: str | Path, split: str, form: str, is_skipping: bool, encoding: str) -> Iterator[Preference | Dropped]:
    faults: list[InputError] = []
    for place, where, row in _placed_rows(source, split, Reading(faults.append if is_skipping else stop, encoding)):
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


def _placed_rows(source: str | Path, split: str, reading: Reading) -> Iterator[tuple[str, str, Row]]:
    """(place for errors, place for reports, row) of every row that can be read."""
    if is_hub_id(source, ROW_ENDINGS):
        yield from ((f"{source}: {where}", where, row) for where, row in open_hub_rows(str(source), split or "train"))
        return
    found = expand(source)
    paths = of_split(found, Path(source), split) if split and os.path.isdir(source) else found
    if not paths:
        refuse(f"--split {split}: no file in {source} is named so, found {', '.join(path.name for path in found[:5])}")
    for path in paths:
        # A file that is named like the split is all of it.
        for where, row in open_rows(path, reading.on_fault, reading.encoding, "" if len(paths) < len(found) else split):
            yield f"{path}: {where}", where if len(paths) == 1 else f"{path.name}: {where}", row


def _emptied(faults: list[InputError]) -> Iterator[Dropped]:
    while faults:
        yield Dropped(str(faults.pop(0)), "malformed")
