"""Votes at a terminal, or from a pipe: a line a vote."""

import io
import sys
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from rwkv_dpo.blind.ballot import ENDED, QUESTION, Ballot

_CHOICES = {"1": "A", "a": "A", "2": "B", "b": "B", "0": "=", "=": "="}
_ASKED = "1: A is better   2: B is better   0: equal   u: undo   e: end with the result   q: leave"
_JUDGED = "All questions are judged.   e: show the result   u: undo   q: leave"


def judge(ballot: Ballot, lines: Iterable[str], say: Callable[[str], object]) -> None:
    """Until the test ends, the judge leaves, or the lines end. InputError when a vote can't be kept."""
    typed = iter(lines)
    while (view := ballot.view())["phase"] != ENDED:
        say(_card(view) if view["phase"] == QUESTION else _JUDGED)
        while not _obey(ballot, view, line := next(typed, "q").strip().lower()):
            say(f"{harmless(line)!r}: {_ASKED if view['phase'] == QUESTION else _JUDGED}")
        if line == "q":
            return


def typed_lines() -> TextIO:
    """Standard input, whatever its bytes."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    return sys.stdin


def harmless(text: str) -> str:
    """Without what would steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode() for c in text)


def _obey(ballot: Ballot, view: dict[str, Any], line: str) -> bool:
    """False for a line that says nothing."""
    if line == "e":
        ballot.end()
    elif line == "u":
        ballot.undo()
    elif line != "q":
        return ballot.vote(view.get("number"), _CHOICES.get(line))
    return True


def _card(view: dict[str, Any]) -> str:
    head = f"--- {view['judged'] + 1} of {view['questions']} ---"
    parts = (head, view["prompt"], f"[A]\n{view['A'] or '(no answer)'}", f"[B]\n{view['B'] or '(no answer)'}", _ASKED)
    return "\n" + "\n\n".join(map(harmless, parts))
