"""What a row of preference data becomes, and what is noted of rows while they are read."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.files.json_text import as_json

Row = Mapping[str, Any]
Messages = list[tuple[str, str]]  # (role, text), each role one of system, user, assistant
_NO_NUMBER = ("", "n/a", "na", "nan", "none", "null")


@dataclass(frozen=True)
class Preference:
    """A dialogue and two answers to its last turn. `where`: the row it was read from, for messages; `turns`: user and assistant
    by turns, the first and the last by the user; `system` may be empty. `scores`: of the chosen and the rejected answer in the row's
    own words, None without any; a margin alone is kept as (margin, 0). `ranking`: of which this is a pair, by its row; its pairs come one
    after the other."""

    where: str
    system: str
    turns: tuple[str, ...]
    chosen: str
    rejected: str
    scores: tuple[float, float] | None = field(default=None, compare=False, repr=False)
    ranking: str = field(default="", compare=False, repr=False)

    @property
    def gap(self) -> float | None:
        """By how much the chosen answer is better."""
        return None if self.scores is None else self.scores[0] - self.scores[1]


@dataclass(frozen=True)
class Ranking:
    """A dialogue and any number of answers to its last turn, each with a score; a higher one is better. `is_part`: the row holds one
    answer, and other rows may hold others to the same dialogue."""

    where: str
    system: str
    turns: tuple[str, ...]
    answers: tuple[str, ...]
    scores: tuple[float, ...]
    is_part: bool = False


@dataclass(frozen=True)
class Dropped:
    """A row that is not used. `where`: the row, or what a malformed one was refused with; `reason`: what rows are counted by."""

    where: str
    reason: str


class Unusable(Exception):
    """A row that is in order, but nothing to learn from; its one argument is the reason that rows are counted by."""


@dataclass
class Notes:
    """What was noted of rows while they were read: their number, what was changed in them (counts by what), the first of them, and what
    the rows of a file have been so far (`kind`)."""

    n_rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first_row: str = ""
    kind: str = ""

    def add_row(self, row: Row) -> None:
        """Counts a row."""
        self.first_row = self.first_row or shown(row)
        self.n_rows += 1

    def agree(self, kind: str) -> None:
        """InputError when rows of a file are of two kinds: one of them is likely misread."""
        if self.kind not in ("", kind):
            refuse(f"is told by its columns as {kind}, and the rows before it as {self.kind}; --format or --columns says what they are")
        self.kind = kind

    def lines(self) -> list[str]:
        """A line for each thing that was noted."""
        return [f"{n:,} {what}" for what, n in (+self.counts).items()]

    def as_json(self) -> dict[str, Any]:
        """For report.json."""
        return {"rows": self.n_rows, "noted": dict(+self.counts)}


def shown(row: Row, longest: int = 60) -> str:
    """The row in a line, long values cut."""
    cells = []
    for name, value in row.items():
        text = as_json(value, ensure_ascii=False, default=repr)
        cells.append(f"{name}: {text if len(text) <= longest else text[:longest] + '...'}")
    return "{" + ", ".join(cells) + "}"


def is_missing(value: object) -> bool:
    """Null, or the NaN that tables have in its place."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(value: object, field: str) -> str:
    """The value, which is text. InputError, naming the field, when it is something else or cannot be written as UTF-8."""
    if not isinstance(value, str):
        refuse(f"field '{field}' is a {type(value).__name__}; expected text")
    if not value.isascii():
        at = next((i for i, c in enumerate(value) if "\ud800" <= c <= "\udfff"), None)
        if at is not None:
            refuse(f"field '{field}' has a lone surrogate at character {at}")
    return value


def number_of(value: object, field: str) -> float | None:
    """The value as a number; None when there is none (null, NaN, N/A). InputError, naming the field, for what is no number."""
    if is_missing(value) or (isinstance(value, str) and value.strip().lower() in _NO_NUMBER):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]  # what is no number raises
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    return number if math.isfinite(number) else refuse(f"field '{field}' is {value!r}; expected a number")
