"""Preferences from what users have: files of rows, folders and globs of them, and Hub data sets."""

import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.files import expand, of_split, open_rows
from rwkv_dpo.data.forms import FORMS, to_preference
from rwkv_dpo.data.hub import is_hub_id, open_hub_rows
from rwkv_dpo.data.preference import Dropped, Notes, Preference, Ranking
from rwkv_dpo.data.rankings import Pairing, paired
from rwkv_dpo.data.text_files import ROW_ENDINGS, Reading, Row, stop

FORMATS = ("auto", *FORMS)
ON_ERROR = ("stop", "skip")


def read_preferences(
    source: str | Path, limit: int = 0, split: str = "", form: str = "auto", on_error: str = "stop", *, encoding: str = "utf-8",
    columns: Mapping[str, str] | None = None, pairing: Pairing | None = None, notes: Notes | None = None,
) -> Iterator[Preference | Dropped]:  # fmt: skip
    """What the rows of `source` hold, one after the other as they are asked for; of at most `limit` rows when it is not 0. Answers that
    stand in a row each come last, when all of them are known.

    source: a file of rows (files.open_rows), also packed, a folder or a glob of those, or a Hub id. `split`: the one that is read of a
    Hub data set ("train" when empty), and of a folder or a file that holds several (all when empty). `form`: one of FORMATS, `columns`:
    what columns.parse_columns returns. A malformed row is an InputError that names file, row and field, or with `on_error` "skip" one
    that is Dropped; any other fault is always an InputError. `pairing`: which pairs are made of rankings. `notes`: collects what is
    noted of rows.
    """
    notes = Notes() if notes is None else notes
    faults: list[InputError] = []
    reading = Reading(stop if on_error == "stop" else faults.append, encoding)
    read = _read(_placed_rows(source, split, reading), form, None if on_error == "stop" else faults, columns, notes)
    return paired(itertools.islice(read, limit) if limit else read, pairing or Pairing(), notes)


def _read(
    rows: Iterator[tuple[str, str, Row]], form: str, faults: list[InputError] | None, columns: Mapping[str, str] | None, notes: Notes
) -> Iterator[Preference | Ranking | Dropped]:
    """faults: of rows that could not be read, put there on the way to the next one that could; None: a malformed row is an error."""
    file = ""
    for place, where, row in rows:
        yield from _emptied(faults, notes)
        if file != (file := place.rpartition(": ")[0]):
            notes.kind = ""
        notes.add_row(row)
        try:
            read = to_preference(row, where, form, columns, notes)
        except InputError as error:
            fault = InputError(f"{place}: {error}")
            if faults is None:
                raise fault from error
            yield Dropped(str(fault), "malformed")
        else:
            yield read
    yield from _emptied(faults, notes)


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


def _emptied(faults: list[InputError] | None, notes: Notes) -> Iterator[Dropped]:
    while faults:
        notes.n_rows += 1
        yield Dropped(str(faults.pop(0)), "malformed")
