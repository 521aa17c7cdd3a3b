"""votes.jsonl: every vote, and every vote taken back, as it falls.

    {"question": 3, "choice": "A"}      of row 3 of answers.jsonl, counted from 1: A is better, B is better, or = (equally good)
    {"undo": 3}                         the last vote, which was of that question, is taken back
    {"end": true}                       the result was shown: nothing follows

A line is on the disk before the next question is shown, so that a process that is killed loses no vote.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.files.atomic import writing
from rwkv_dpo.files.json_text import as_json, mend_last_line
from rwkv_dpo.files.locks import try_lock

FILE = "votes.jsonl"
CHOICES = ("A", "B", "=")


class Votes:
    """`choices`: those that stand, by the number of their question, in the order in which they fell; `is_ended`: the result was shown."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self.choices: dict[int, str] = {}
        self.is_ended = False

    def vote(self, question: int, choice: str) -> None:
        """InputError, and no vote, when the disk is full."""
        self._append({"question": question, "choice": choice})

    def undo(self) -> None:
        """Takes the last vote back, where there is one. InputError as of vote."""
        if self.choices:
            self._append({"undo": next(reversed(self.choices))})

    def end(self) -> None:
        """InputError as of vote."""
        self._append({"end": True})

    def take(self, record: Any, n_questions: int) -> bool:
        """What a line of the file says becomes so; False when it can't follow on what was before."""
        if not isinstance(record, dict) or self.is_ended:
            return False
        question, choice = record.get("question"), record.get("choice")
        if type(question) is int and 1 <= question <= n_questions and choice in CHOICES and question not in self.choices:
            self.choices[question] = choice
        elif self.choices and record.get("undo") == next(reversed(self.choices)):
            self.choices.popitem()
        elif record.get("end") is True:
            self.is_ended = True
        else:
            return False
        return True

    def _append(self, record: dict[str, Any]) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            with writing(self._path):
                rest = memoryview(as_json(record).encode() + b"\n")
                # Without a buffer a write may take a part only, on a disk that is nearly full.
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
        except BaseException:
            # The next vote would be written onto half of this one.
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            raise
        self.take(record, record.get("question", 0))


@contextlib.contextmanager
def open_votes(folder: Path, n_questions: int) -> Iterator[Votes]:
    """The votes in a folder, which one process at a time may hold; half a line at the end is cut off. InputError when another process
    holds them, for a file that can't be written to, and for a line that is no vote."""
    path = folder / FILE
    with writing(path):
        file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by the next block
    with file:
        with writing(path):
            _hold(path, file.fileno())
            mend_last_line(path)
            lines = path.read_bytes().split(b"\n")[:-1]
        votes = Votes(path, file)  # type: ignore[arg-type]  # without a buffer, a BinaryIO too
        for number, line in enumerate(lines, start=1):
            if not votes.take(_parsed(line), n_questions):
                refuse(f"{path}: line {number}: no vote of this test: {line[:60].decode(errors='replace')!r}")
        yield votes


def _hold(path: Path, descriptor: int) -> None:
    try:
        is_ours = try_lock(descriptor)
    except OSError:
        is_ours = True  # a file system without locks
    if not is_ours:
        refuse(f"{path}: another process is voting in this folder")


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
