"""Rows of chat data as documents to train on, written in the chat template: dialogues, instructions, prompts with their answers."""

from typing import Any

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.files import text_field
from rwkv_dpo.data.messages import to_messages
from rwkv_dpo.data.preference import Notes, Preference, Unusable
from rwkv_dpo.data.prompts import MODES, render
from rwkv_dpo.data.text_files import Row

# Columns by what they hold; the first that a row has counts.
_DIALOGUES = ("messages", "conversations", "conversation")
_ASKED = ("instruction", "prompt", "question", "query")
_ANSWERED = ("output", "response", "completion", "answer")
_SYSTEM = ("system", "system_prompt")
_BESIDE = ("input", "context")
# Of a row that prefers one answer to another: prepare_pairs.py reads it.
_PREFERRED = frozenset(("chosen", "rejected"))

_EXPECTED = f"field 'text', or chat data: {' or '.join(_DIALOGUES)}, or one of {', '.join(_ASKED)} with one of {', '.join(_ANSWERED)}"


def document_of(row: Row, field: str, source: str) -> str:
    """The text in `field`, or when that is empty, in 'text', or else what the chat data of the row's columns say, as a chat. InputError,
    naming `source`, for a row that has none of them, or a dialogue that does not go by turns from a user to an assistant.

    >>> document_of({"instruction": "Add.", "input": "1 + 1", "output": "2"}, "", "row 1")
    'User: Add.\\n1 + 1\\n\\nAssistant: 2\\n\\n'
    """
    if field or "text" in row:
        return text_field(row, field or "text", source)
    try:
        return _written(_messages_of(row))
    except Unusable as error:
        raise InputError(f"{source}: {error}, which the chat template has no words for") from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _messages_of(row: Row) -> list[tuple[str, str]]:
    """(role, text) of every message."""
    dialogue, asked, answered, told, beside = (_first(row, names) for names in (_DIALOGUES, _ASKED, _ANSWERED, _SYSTEM, _BESIDE))
    system = [("system", text_field(row, told, "the row"))] if told and row[told] else []
    if dialogue:
        return [*system, *to_messages(row[dialogue], dialogue, Notes())]
    if not (asked and answered) or row.keys() & _PREFERRED:
        refuse(f"no field 'text', found {', '.join(map(repr, row)) or 'none'}; expected {_EXPECTED}")
    lead = to_messages(row[asked], asked, Notes(), "user")
    if beside and row[beside]:
        lead[-1] = lead[-1][0], f"{lead[-1][1]}\n{text_field(row, beside, 'the row')}"
    reply = to_messages(row[answered], answered, Notes(), "assistant")
    return [*system, *_history(row.get("history") or []), *lead, *reply]


def _written(messages: list[tuple[str, str]]) -> str:
    system = messages[0][1] if messages and messages[0][0] == "system" else ""
    turns = messages[1:] if messages and messages[0][0] == "system" else messages
    for i, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            refuse(f"message {i + 1 + len(messages) - len(turns)} is from the {role}; expected the {('user', 'assistant')[i % 2]}")
    if not turns or len(turns) % 2:
        refuse(f"the dialogue ends with {'a message from the user' if turns else 'no message'}; expected one from the assistant")
    *asked, answer = (text for _, text in turns)
    written = render(Preference("", system, tuple(asked), answer, ""), MODES["chat"], seed=0)
    return written.prompt + written.chosen if written.chosen else refuse("the last answer is empty")


def _history(turns: Any) -> list[tuple[str, str]]:
    """Earlier questions and answers, as Alpaca's form keeps them: [[question, answer], ...]."""
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        refuse("field 'history' is no list of pairs of a question and an answer")
    named = ({"user": question, "assistant": answer} for question, answer in turns)
    return [(role, text_field(turn, role, "field 'history'")) for turn in named for role in turn]


def _first(row: Row, names: tuple[str, ...]) -> str:
    return next((name for name in names if name in row), "")
