"""Messages that a program printed into a cell of a table, in JSON or as Python prints lists, read back as messages."""

import ast
import io
import itertools
import json
import re
import tokenize
from typing import Any

from rwkv_dpo.base.errors import refuse

# Larger than any dialogue; Python's parser takes some hundred bytes a character.
_LONGEST = 1 << 20


_BEGINNING = re.compile(r"\s*(array\()?\[?\s*\{\s*(['\"])\w+\2\s*:")


_ROLE, _SAID = re.compile(r"['\"](role|from)['\"]\s*:"), re.compile(r"['\"](content|value)['\"]\s*:")


def unprinted(text: str, name: str) -> Any:
    """The messages, or the one message, that `text` is a print of; the text itself when it is none. InputError, naming the field, when
    it begins like one and cannot be read: it is never a text to train on.

    >>> unprinted("[{'role': 'user', 'content': 'Hi'}]", "prompt")
    [{'role': 'user', 'content': 'Hi'}]
    """
    if not (_BEGINNING.match(text) and _ROLE.search(text) and _SAID.search(text)):
        return text
    if len(text) > _LONGEST:
        refuse(f"field '{name}' is a printed list of messages of {len(text):,} characters; at most {_LONGEST:,} are read")
    for read in (json.loads, ast.literal_eval, _as_numpy_prints):
        try:
            value = read(text.strip())
        # literal_eval warns of backslashes as errors where the tests say so, and tells of depth in several ways.
        except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
        if all(map(_is_message, value if isinstance(value, list) else [value])):
            return value
    refuse(f"field '{name}' begins like a printed list of messages, and cannot be read as one: {text[:60]!r}")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and (value.keys() >= {"role", "content"} or value.keys() >= {"from", "value"})


def _as_numpy_prints(text: str) -> Any:
    """An array of objects as pandas writes it into a cell, without commas between them: [{'role': ...}\\n {'role': ...}]."""
    lines = io.StringIO(text.removeprefix("array(").removesuffix(", dtype=object)")).readline
    marks = [token.string for token in tokenize.generate_tokens(lines) if token.string.strip()]
    parted = (f"{mark}," if (mark, after) == ("}", "{") else mark for mark, after in itertools.pairwise([*marks, ""]))
    return ast.literal_eval(" ".join(parted))
