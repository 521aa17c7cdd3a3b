"""Rows out of JSON files, whose content tells what they are, whatever they are called: an array of rows, one object a line, objects one
after the other, or one object that holds all rows: {"data": [...]}, a dictionary of splits, or one of columns."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.json_stream import JsonStream, why_not_json
from rwkv_dpo.data.text_files import Reading, beginning, ending, open_lines, text_blocks

# Names under which one object holds all rows.
_WRAPPERS = frozenset(("data", "rows", "examples", "instances", "items", "records", "samples", "dataset"))
_SPLITS = re.compile(r"(train|test|valid|validation|val|dev|eval|heldout)(ing)?([_-]\w+)*")
# What no object has beside its rows: where it has them, it is a row itself.
_OF_A_ROW = frozenset(("prompt", "chosen", "rejected", "messages", "conversations", "instruction", "question", "text"))
_NESTED = re.compile(rf'\{{\s*"({"|".join(sorted(_WRAPPERS))}|{_SPLITS.pattern})"\s*:\s*[\[{{]')


def json_rows(path: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
    """("line 7" or "row 7", value) of every row."""
    if _is_lines(beginning(path, reading.encoding)[0].lstrip(), ending(path) != ".json"):
        _refuse_split(path, reading, [])
        rows = _lines(path, reading)
    else:
        stream = JsonStream(path, text_blocks(path, reading.encoding))
        first = stream.peek()
        if first not in ("[", "{"):
            refuse(f"{path}: {f'begins with {first!r}' if first else 'is empty'}; expected an array of rows, or objects")
        rows = _objects(stream, path, reading) if first == "{" else _array(stream, path, reading)
    for where, row in rows:
        # As the Hub's viewer answers.
        yield where, row["row"] if isinstance(row, dict) and row.keys() >= {"row_idx", "row"} else row


def _is_lines(head: str, is_named_so: bool) -> bool:
    """Whether a file that begins with `head` has one row a line."""
    line, _, rest = head.partition("\n")
    value = _parsed(line)
    if head[:1] == "[":
        is_row_array = isinstance(value, list) and all(isinstance(row, dict) for row in value) and value
        return is_named_so and value is not None and not is_row_array
    if head[:1] != "{":
        return is_named_so
    if isinstance(value, dict):
        return bool(rest.strip()) or (is_named_so and not _holds_rows(value))
    if _NESTED.match(head):
        return False
    if any(isinstance(_parsed(line), dict) for line in rest.split("\n", 20)[:20]):
        return True
    try:
        _, end = json.JSONDecoder().raw_decode(head)
    except (ValueError, RecursionError):
        return is_named_so
    return is_named_so and "\n" not in head[:end] and not head[end:].lstrip().startswith("{")


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _lines(path: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
    for where, line in open_lines(path, reading.on_fault, reading.encoding):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reading.on_fault(InputError(f"{path}: {where}: not JSON: {why_not_json(error)}"))
        else:
            yield where, row


def _refuse_split(path: Path, reading: Reading, found: list[str]) -> None:
    if reading.split and reading.split not in found:
        refuse(f"--split {reading.split}: {path} has {'the splits ' + ', '.join(found) if found else 'no splits'}")


def _array(stream: JsonStream, path: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
    _refuse_split(path, reading, [])
    stream.take()
    for row in stream.items():
        yield stream.where, row
    stream.end("the array")


def _objects(stream: JsonStream, path: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
    """The first object may hold all rows."""
    stream.take()
    row: dict[str, Any] = {}
    arrays = []
    mark = stream.take() if stream.peek() == "}" else ","
    while mark == ",":
        stream.where = "row 1"
        if stream.peek() != '"':
            stream.take('"')
        name = stream.value()
        stream.take(":")
        if not (_is_outer(name) and stream.peek() == "["):
            row[name] = stream.value()
        else:
            stream.take()
            items = stream.items()
            if stream.peek() == "{":
                arrays.append(name)
                yield from ((_where(stream.where, name), item) for item in items if _is_wanted(name, reading))
            else:
                row[name] = list(items)
        mark = stream.take(",}")
    if not (arrays or _holds_rows(row)):
        _refuse_split(path, reading, [])
        yield "row 1", row
        yield from _further(stream)
        return
    stream.end("the object that holds all rows")
    if arrays and (beside := _OF_A_ROW & row.keys()):
        refuse(f"{path}: rows in {arrays[0]!r}, and {min(beside)!r} beside them; expected one object a row, or one that holds all rows")
    _refuse_split(path, reading, [*filter(_SPLITS.fullmatch, arrays), *_splits(row)])
    if not arrays:
        yield from _unfolded(row, "", reading)


def _further(stream: JsonStream) -> Iterator[tuple[str, Any]]:
    n = 1
    while stream.peek():
        n += 1
        stream.where = f"row {n}"
        if stream.peek() != "{":
            stream.where = f"row {n - 1}"
            stream.take("{")
        yield f"row {n}", stream.value()


def _unfolded(value: Any, name: str, reading: Reading) -> Iterator[tuple[str, Any]]:
    """The rows in what an object holds, or the object as the only row."""
    if folds := _folds(value):
        for key in filter(lambda key: _is_wanted(key, reading), folds):
            yield from _unfolded(value[key], key, reading)
        return
    columns = _columns(value)
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)) if columns else value
    for n, row in enumerate(rows if columns or isinstance(value, list) else [value], start=1):
        yield _where(f"row {n}", name), row


def _columns(value: Any) -> dict[str, list[Any]]:
    """An object of equally long columns, lists or (as pandas writes them) objects with numbers for names; none for any other."""
    if not isinstance(value, dict) or not value:
        return {}
    if all(isinstance(one, dict) and one and all(key.isdecimal() for key in one) for one in value.values()):
        numbers = next(iter(value.values())).keys()
        value = {name: list(one.values()) for name, one in value.items()} if all(one.keys() == numbers for one in value.values()) else {}
    lists = {name: one for name, one in value.items() if isinstance(one, list) and one and not _is_messages(one)}
    return lists if len(lists) == len(value) and len({len(one) for one in lists.values()}) == 1 else {}


def _holds_rows(value: dict[str, Any]) -> bool:
    return bool(_columns(value) or _folds(value))


def _folds(value: Any) -> list[str]:
    """The names in an object under which there are rows, or more objects that hold them."""
    if not isinstance(value, dict) or not _OF_A_ROW.isdisjoint(value):
        return []
    return [name for name, one in value.items() if _is_outer(name) and (isinstance(one, dict) or _is_rows(one))]


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value) and not _is_messages(value)


def _is_messages(values: list[Any]) -> bool:
    return any(isinstance(one, dict) and not one.keys().isdisjoint(("role", "from")) for one in values)


def _is_outer(name: str) -> bool:
    return name in _WRAPPERS or _SPLITS.fullmatch(name) is not None


def _splits(value: dict[str, Any]) -> list[str]:
    names = _folds(value)
    inner = [name for key in names if key in _WRAPPERS and isinstance(value[key], dict) for name in _splits(value[key])]
    return [*filter(_SPLITS.fullmatch, names), *inner]


def _is_wanted(name: str, reading: Reading) -> bool:
    return not reading.split or name == reading.split or name in _WRAPPERS


def _where(where: str, name: str) -> str:
    return f"{name} {where}" if _SPLITS.fullmatch(name) else where
