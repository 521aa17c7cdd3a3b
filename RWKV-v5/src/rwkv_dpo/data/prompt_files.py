"""Prompts: how a model is asked one, and files of them: a line each, or JSON rows with a field `prompt`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from rwkv_dpo.base.errors import InputError, read_utf8, refuse
from rwkv_dpo.data.preference import Preference
from rwkv_dpo.data.prompts import MODES, render


def as_question(prompt: str, system: str = "") -> str:
    """The text before an answer, in the chat template that prepare_pairs.py writes.

    >>> as_question("Hi")
    'User: Hi\\n\\nAssistant:'
    """
    return render(Preference("", system, (prompt,), "", ""), MODES["chat"], seed=0).prompt


class PromptRow(NamedTuple):
    """`where`: the file and line, for messages; `fields`: all that a JSON row has."""

    where: str
    prompt: str
    fields: Mapping[str, Any]


def read_prompts(flag: str, path: Path, is_json: bool | None = None) -> list[PromptRow]:
    """A prompt a line, or of JSON rows (is_json; None: of a .jsonl file) the field `prompt`; blank lines aside. InputError, which names
    the flag, for a file that has none, or isn't UTF-8."""
    text = read_utf8(f"{flag} {path}", path)
    is_json = path.suffix == ".jsonl" if is_json is None else is_json
    # Not splitlines, which ends lines at characters that JSON texts hold as they are.
    lines = [(f"{flag} {path}: line {number}", line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    rows = [_json_row(where, line) if is_json else PromptRow(where, line.strip(), {}) for where, line in lines]
    return rows or refuse(f"{flag} {path}: holds no prompt")


def is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a text that UTF-8 can hold: JSON may spell half of a character."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _json_row(where: str, line: str) -> PromptRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not is_text(prompt) or not prompt.strip():
        refuse(f"{where}: has no text in a field 'prompt'")
    return PromptRow(where, prompt.strip(), row)
