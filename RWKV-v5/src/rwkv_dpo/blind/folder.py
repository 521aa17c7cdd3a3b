"""The folder of one test: by what it is known, so that the same command continues in it and no other test's votes are mixed in."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.blind.cards import FILE as ANSWERS
from rwkv_dpo.blind.votes import FILE as VOTES
from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.files.json_text import as_json

FILE = "blindtest.json"
# What is known by its content; everything else is a flag.
CONTENT = ("models", "questions")


def check(folder: Path, test: Mapping[str, Any]) -> None:
    """InputError for the folder of another test. test: what makes the test the one it is, as JSON values: hashes under the names of
    CONTENT, and flags."""
    before = _read(folder)
    if before is not None and (changes := _changes(before, test)):
        refuse(f"--folder {folder}: holds another test: {', '.join(changes)}; another folder takes this one")


def claim(folder: Path, names: Sequence[str], test: Mapping[str, Any]) -> None:
    """Makes the folder, where it isn't there, that of a test. names: of the models, for readers of FILE. InputError as of check, and for
    one that can't be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--folder {folder}: cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        refuse(f"--folder {folder}: cannot be written to")
    check(folder, test)
    if not (folder / FILE).exists():
        with atomic_write(folder / FILE) as file:
            file.write(as_json({"names": names, "test": test}, indent=1, ensure_ascii=False).encode() + b"\n")


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        text = (folder / FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        if found := [name for name in (ANSWERS, VOTES) if (folder / name).exists()]:
            refuse(f"--folder {folder}: holds {found[0]}, and no {FILE} that says of which test")
        return None
    except OSError as error:
        raise InputError(f"--folder {folder}: {FILE} cannot be read: {error.strerror}") from error
    try:
        written = json.loads(text)
    except (ValueError, RecursionError):
        written = None
    test = written.get("test") if isinstance(written, dict) else None
    return test if isinstance(test, dict) else refuse(f"--folder {folder}: its {FILE} is none that blindtest.py writes")


def _changes(before: Mapping[str, Any], test: Mapping[str, Any]) -> list[str]:
    """What is another than before, each in a few words."""
    names = [name for name in dict.fromkeys((*test, *before)) if test.get(name) != before.get(name)]
    return [f"other {name}" if name in CONTENT else f"--{name} was {before.get(name)!r}" for name in names]
