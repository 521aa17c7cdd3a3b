"""Reading what users have: preferences (.json, .jsonl) and documents (.jsonl, .txt).

A fault is one InputError that names the file, the row (.json, counted from 1) or line (.jsonl, .txt), and the field.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwkv_dpo.errors import InputError, refuse

_FORMS = "a row has prompt, chosen and rejected texts, or conversations, chosen and rejected messages (from, value)"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Preference:
    """A dialogue and two answers to its last turn. `where`: the row it was read from, for messages; `turns`: user and assistant
    by turns, the first and the last by the user; `system` may be empty."""

    where: str
    system: str
    turns: tuple[str, ...]
    chosen: str
    rejected: str


def read_preferences(path: str | Path, limit: int = 0) -> list[Preference]:
    """The preferences of a .json (one array) or .jsonl file, at most `limit` of them when it is not 0."""
    rows = _rows(Path(path))
    return [_preference(row, where, path) for where, row in (itertools.islice(rows, limit) if limit else rows)]


def read_documents(path: str | Path, field: str = "text", split_blank_lines: bool = False) -> Iterator[str]:
    """The texts of a .jsonl file's `field`, or a .txt file as one document or, when split, as many as blank lines part."""
    path = Path(path)
    if path.suffix == ".txt":
        text = _read(path)
        yield from ("\n".join(lines) for lines in _paragraphs(text)) if split_blank_lines else [text]
    elif path.suffix == ".jsonl":
        for where, row in _rows(path):
            yield _text(row, field, f"{path}: {where}")
    else:
        refuse(f"{path}: documents are read from .jsonl and .txt files")


def _paragraphs(text: str) -> Iterator[list[str]]:
    for is_text, lines in itertools.groupby(text.split("\n"), key=lambda line: bool(line.strip())):
        if is_text:
            yield list(lines)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix not in (".json", ".jsonl"):
        refuse(f"{path}: rows are read from .json and .jsonl files")
    text = _read(path)
    if path.suffix == ".json":
        rows = _parse(text, str(path))
        if not isinstance(rows, list):
            refuse(f"{path}: holds a {type(rows).__name__}; expected one array of rows")
        numbered = ((f"row {i}", row) for i, row in enumerate(rows, start=1))
    else:
        # Only "\n" ends a line: JSON strings may hold other line separators.
        lines = ((f"line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip())
        numbered = ((where, _parse(line, f"{path}: {where}")) for where, line in lines)
    for where, row in numbered:
        if not isinstance(row, dict):
            refuse(f"{path}: {where}: is a {type(row).__name__}; expected an object with named fields")
        yield where, row


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _parse(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not JSON: {error}") from error


def _preference(row: dict[str, Any], where: str, path: str | Path) -> Preference:
    source = f"{path}: {where}"
    if "conversations" in row:
        system, turns = _dialogue(row["conversations"], f"{source}: field 'conversations'")
        chosen, rejected = (_message(row.get(name), f"{source}: field '{name}'", "assistant") for name in ("chosen", "rejected"))
        return Preference(where, system, turns, chosen, rejected)
    if not row.keys() >= {"prompt", "chosen", "rejected"}:
        refuse(f"{source}: has the fields {_names(row)}; {_FORMS}")
    prompt, chosen, rejected = (_text(row, name, source) for name in ("prompt", "chosen", "rejected"))
    return Preference(where, "", (prompt,), chosen, rejected)


def _dialogue(messages: object, source: str) -> tuple[str, tuple[str, ...]]:
    if not isinstance(messages, list) or not messages:
        refuse(f"{source}: expected a list of messages")
    is_system = _role(messages[0]) == "system"
    system = _message(messages[0], source, "system") if is_system else ""
    turns = messages[1:] if is_system else messages
    if len(turns) % 2 == 0:
        refuse(f"{source}: {len(turns)} turns; expected an odd number, the last by the user")
    return system, tuple(
        _message(message, f"{source}: turn {i + 1}", ("user", "assistant")[i % 2]) for i, message in enumerate(turns)
    )


def _message(message: object, source: str, role: str) -> str:
    if not isinstance(message, dict):
        refuse(f"{source}: expected a message with 'from' and 'value'")
    if _role(message) != role:
        refuse(f"{source}: is from {message.get('from')!r}; expected the {role}")
    return _text(message, "value", source)


def _role(message: object) -> str | None:
    speaker = message.get("from") if isinstance(message, dict) else None
    return _ROLES.get(speaker) if isinstance(speaker, str) else None


def _names(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _text(row: dict[str, Any], field: str, source: str) -> str:
    if field not in row:
        refuse(f"{source}: no field '{field}', found {_names(row)}")
    text = row[field]
    if not isinstance(text, str):
        refuse(f"{source}: field '{field}' is a {type(text).__name__}; expected text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{source}: field '{field}' has a lone surrogate at character {error.start}") from error
    return text
