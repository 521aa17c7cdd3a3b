"""Prompts that a user types or keeps in a file, and how a model is asked them."""

import json
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.preference import Preference
from rwkv_dpo.data.prompts import MODES, render


def as_question(prompt: str, system: str = "") -> str:
    """The text before an answer, in the chat template that prepare_pairs.py writes.

    >>> as_question("Hi")
    'User: Hi\\n\\nAssistant:'
    """
    return render(Preference("", system, (prompt,), "", ""), MODES["chat"], seed=0).prompt


def read_prompts(flag: str, path: str | Path) -> list[str]:
    """A prompt a line; of a .jsonl file the field `prompt` of each. flag: that names the file. InputError for a file without any, and
    for one that isn't UTF-8."""
    name, path = f"--{flag} {path}", Path(path)
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8: {error.reason} at byte {error.start}") from error
    lines = enumerate(text.splitlines(), start=1)
    prompts = [_prompt(line, f"{name}: line {number}", path.suffix == ".jsonl") for number, line in lines if line.strip()]
    return prompts or refuse(f"{name}: holds no prompt")


def _prompt(line: str, name: str, is_json: bool) -> str:
    prompt: Any = line
    if is_json:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name}: not JSON: {error}") from error
        prompt = row.get("prompt") if isinstance(row, dict) else None
    if not (isinstance(prompt, str) and prompt.strip()):
        refuse(f"{name}: has no text in a field 'prompt'")
    return prompt.strip()
