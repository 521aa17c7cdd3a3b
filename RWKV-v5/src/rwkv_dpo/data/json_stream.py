"""JSON values out of text that comes in blocks; faults name the row and the line."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from rwkv_dpo.base.errors import InputError, refuse

_SPACE = re.compile(r"[ \t\r\n]*")
_LAST_COMMA = re.compile(r",\s*([}\]])")


_decode_json = json.JSONDecoder().raw_decode


def why_not_json(error: ValueError | RecursionError) -> str:
    """What is wrong, in a few words. A comma after the last element is named as such, which Python's message leaves to be guessed."""
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    before = error.doc[: error.pos].rstrip()
    at = len(before) - 1 if before.endswith(",") else error.pos
    comma = _LAST_COMMA.match(error.doc, at)
    return f"a comma before {comma[1]!r}" if comma else error.msg


class JsonStream:
    """JSON text that comes in blocks; holds no more than the value it is at and a block. `where`: what faults name, the row."""

    def __init__(self, path: Path, blocks: Iterator[str]) -> None:
        self.where = "row 1"
        self._path, self._blocks = path, blocks
        self._text, self._at, self._n_lines = "", 0, 0

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or not self._read(1):
                return self._text[self._at : self._at + 1]

    def take(self, expected: str = "") -> str:
        """The same, and goes past it. Refuses any other character than those `expected`."""
        mark = self.peek()
        if expected and (not mark or mark not in expected):
            self._refuse(f"{mark or 'the end of the file'!r} follows it; expected {' or '.join(map(repr, expected))}")
        self._at += len(mark)
        return mark

    def value(self) -> Any:
        """The next value, of any size."""
        self.peek()
        while True:
            try:
                value, self._at = _decode_json(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                # Cut off, perhaps: try with twice the text, so that a value of any size is tried a few times only.
                if not self._read(len(self._text) - self._at):
                    self._refuse(why_not_json(error), error.pos, error)
            except (ValueError, RecursionError) as error:
                self._refuse(str(error), error=error)

    def items(self) -> Iterator[Any]:
        """The values of an array whose "[" is taken."""
        if self.peek() == "]":
            self.take()
            return
        n = 0
        while True:
            n += 1
            self.where = f"row {n}"
            if n > 1 and self.peek() == "]":
                self._refuse("a comma before ']'")
            yield self.value()
            if self.take(",]") == "]":
                return

    def end(self, what: str) -> None:
        """Refuses more text."""
        if rest := self.peek():
            refuse(f"{self._path}: not JSON: {rest!r} follows {what} at line {self._line(self._at)}")

    def _refuse(self, reason: str, at: int | None = None, error: Exception | None = None) -> NoReturn:
        line = self._line(self._at if at is None else at)
        raise InputError(f"{self._path}: {self.where}: not JSON: {reason} at line {line}") from error

    def _line(self, at: int) -> int:
        return 1 + self._n_lines + self._text.count("\n", 0, at)

    def _read(self, n: int) -> bool:
        added = []
        while n > 0 and (block := next(self._blocks, None)) is not None:
            added.append(block)
            n -= len(block)
        if added:
            self._n_lines += self._text.count("\n", 0, self._at)
            self._text, self._at = "".join([self._text[self._at :], *added]), 0
        return bool(added)
