"""Preferences from what users have: files of rows, folders and globs of them, and Hub data sets."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.files import expand, open_rows
from rwkv_dpo.data.forms import FORMS, to_preference
from rwkv_dpo.data.hub import is_hub_id, open_hub_rows
from rwkv_dpo.data.preference import Dropped, Notes, Preference, Ranking
from rwkv_dpo.data.rankings import Pairing, paired
from rwkv_dpo.data.text_files import ROW_ENDINGS, Row, stop

FORMATS = ("auto", *FORMS)
ON_ERROR = ("stop", "skip")


def read_preferences(
    source: str | Path, limit: int = 0, split: str = "", form: str = "auto", on_error: str = "stop", *,
    columns: Mapping[str, str] | None = None, pairing: Pairing | None = None, notes: Notes | None = None,
) -> Iterator[Preference | Dropped]:  # fmt: skip
    """What the rows of `source` hold, one after the other as they are asked for; of at most `limit` rows when it is not 0. Answers that
    stand in a row each come last, when all of them are known.

    source: a .json, .jsonl, .parquet or .csv file, each also as .gz, a folder or a glob of those, or a Hub id, of which `split`
    ("train" when empty) is read. `form`: one of FORMATS, `columns`: what columns.parse_columns returns. A malformed row is an
    InputError that names file, row and field, or with `on_error` "skip" one that is Dropped; any other fault is always an InputError.
    `pairing`: which pairs are made of rankings. `notes`: collects what is noted of rows.
    """
    notes = Notes() if notes is None else notes
    read = _read(source, split, form, on_error == "skip", columns, notes)
    return paired(itertools.islice(read, limit) if limit else read, pairing or Pairing(), notes)


def _read(
    source: str | Path, split: str, form: str, is_skipping: bool, columns: Mapping[str, str] | None, notes: Notes
) -> Iterator[Preference | Ranking | Dropped]:
    faults: list[InputError] = []
    file = ""
    for place, where, row in _placed_rows(source, split, faults if is_skipping else None):
        yield from _emptied(faults, notes)
        if file != (file := place.rpartition(": ")[0]):
            notes.kind = ""
        notes.add_row(row)
        try:
            read = to_preference(row, where, form, columns, notes)
        except InputError as error:
            fault = InputError(f"{place}: {error}")
            if not is_skipping:
                raise fault from error
            yield Dropped(str(fault), "malformed")
        else:
            yield read
    yield from _emptied(faults, notes)


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


def _emptied(faults: list[InputError], notes: Notes) -> Iterator[Dropped]:
    while faults:
        notes.n_rows += 1
        yield Dropped(str(faults.pop(0)), "malformed")
