"""Messages as data sets write them, told as (role, text).

A message has role and content, from and value, or their like, among fields that are null (as parquet pads them) or only tell more
(`name`). Its content is text or a list of parts, of which texts are joined and images left out and counted. A dialogue is a list of
them, one of them alone, {"messages": [...]}, a list of [question, answer], or any of these printed into a cell of text.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.preference import Messages, Notes, Unusable, is_missing, text_of

ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt", "gpt4", "gpt-4", "ai", "chatbot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
# What the templates have no words for.
_TOOLS = ("tool", "function", "observation", "ipython", "function_call", "tool_call", "function_response", "tool_response")
_SPEAKERS = (("role", "content"), ("from", "value"), ("role", "text"), ("role", "value"), ("from", "content"), ("speaker", "text"))
_CALLS = ("tool_calls", "function_call")
TOOL_TURNS = "tool turns"
IMAGES = "images left out"
# A list of messages printed by Python or as JSON.
_PRINTED = re.compile(r"""(?:\s*\[)?\s*\{\s*['"](?:role|content|from|value)['"]\s*:""")
# numpy prints a list of messages without commas between them.
_NUMPY_SEAM = re.compile(r"\} ?\n ?\{(?=['\"])")


def to_messages(value: Any, field: str, notes: Notes, speaker: str = "") -> Messages:
    """The messages in a value. Text alone is a message of `speaker`, when one is given. InputError names the field; Unusable for
    dialogues with tools.

    >>> to_messages([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], "conversations", Notes())
    [('user', 'Hi'), ('assistant', 'Hello!')]
    """
    value = unprinted(value, field)
    if isinstance(value, Mapping):
        value = value["messages"] if isinstance(value.get("messages"), list) else [value]
    if speaker and isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if speaker and isinstance(value, str):
        return [(speaker, text_of(value, field))]
    if not isinstance(value, list):
        refuse(f"field '{field}' is a {type(value).__name__}; expected {'text or messages' if speaker else 'a list of messages'}")
    told = [_turn(one, f"field '{field}': message {i}", notes) for i, one in enumerate(value, start=1)]
    return [message for turn in told for message in turn]


def is_messages(value: Any) -> bool:
    """Whether a value is one message or more, printed ones too, rather than text."""
    if isinstance(value, str):
        return _PRINTED.match(value) is not None
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(one, Mapping | list) for one in value))


def unprinted(value: Any, field: str) -> Any:
    """What was printed into a cell of text as a list of messages; any other value as it is. InputError when it can't be read back:
    it must not be taken for somebody's words."""
    if not (isinstance(value, str) and _PRINTED.match(value)):
        return value
    read = parsed(value)
    if isinstance(read, Mapping):
        read = [read]
    if isinstance(read, list) and all(isinstance(one, Mapping) for one in read):
        # Somebody's words after all, if nobody in it speaks.
        return read if all(_speaker(one) for one in read) else value
    refuse(f"field '{field}' looks like a printed list of messages, and is neither JSON nor a Python list: {value[:60]!r}")


def parsed(text: str) -> Any:
    """The value that JSON, Python or numpy printed as this text; None when none of them did."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    for source in (text.strip(), _NUMPY_SEAM.sub("}, {", text.strip())):
        try:
            return ast.literal_eval(source)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass
    return None


def role_of(name: object, source: str) -> str:
    """system, user or assistant, by any of the names in ROLES, in any letter case. Unusable for a tool."""
    known = name.strip().lower() if isinstance(name, str) else None
    if known in _TOOLS:
        raise Unusable(TOOL_TURNS)
    return ROLES[known] if known in ROLES else refuse(f"{source}: is from {name!r}; accepted are {', '.join(ROLES)}")


def _turn(message: Any, source: str, notes: Notes) -> Messages:
    if isinstance(message, list | tuple) and len(message) == 2 and all(isinstance(one, str) for one in message):
        return _exchange(message, source)
    if not isinstance(message, Mapping):
        _no_message(source)
    if {"input", "output"} <= message.keys() and not _speaker(message):
        return _exchange((message["input"], message["output"]), source)
    keys = _speaker(message)
    if not keys:
        _no_message(source)
    speaker, content = keys
    role = role_of(message[speaker], source)
    if any(message.get(call) for call in _CALLS):
        raise Unusable(TOOL_TURNS)
    try:
        return [(role, _text(message.get(content), content, notes))]
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _exchange(exchange: Sequence[Any], source: str) -> Messages:
    question, answer = (text_of(one, f"{name} of {source}") for one, name in zip(exchange, ("question", "answer"), strict=True))
    return [("user", question), ("assistant", answer)]


def _speaker(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """Which of its fields are the role and the content: those that are not null, or null as in a call of a tool."""
    for keys in _SPEAKERS:
        if all(not is_missing(message.get(key)) for key in keys):
            return keys
    return next((keys for keys in _SPEAKERS[:2] if keys[1] in message and not is_missing(message.get(keys[0]))), None)


def _text(content: Any, field: str, notes: Notes) -> str:
    if not isinstance(content, list):
        return text_of(content, field)
    texts = []
    for part in content:
        if isinstance(part, Mapping) and isinstance(part.get("text"), str) and "image" not in str(part.get("type")):
            texts.append(text_of(part["text"], field))
        elif isinstance(part, str):
            texts.append(text_of(part, field))
        elif isinstance(part, Mapping) and re.search("image|video|audio", str(part.get("type") or list(part))):
            notes.counts[IMAGES] += 1
        else:
            refuse(f"field '{field}' has a part that is neither text nor an image: {part!r:.60}")
    return "\n".join(texts)


def _no_message(source: str) -> NoReturn:
    refuse(f"{source}: expected a role and content, or from and value")
