"""Rows of chat data as documents to train on, written in the chat template: dialogues, instructions, prompts with their answers."""

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.columns import ANSWER, DIALOGUES, PROMPTS, first_of, present
from rwkv_dpo.data.dialogues import prompt_messages, turns_of
from rwkv_dpo.data.files import text_field
from rwkv_dpo.data.messages import to_messages
from rwkv_dpo.data.preference import Messages, Notes, Preference, Unusable
from rwkv_dpo.data.prompts import MODES, render
from rwkv_dpo.data.text_files import Row

# Columns of a row that prefers one answer to another: prepare_pairs.py reads it.
_PREFERRED = frozenset(("chosen", "rejected"))
_ASKED = ", ".join(name for name in PROMPTS if name not in DIALOGUES)
_EXPECTED = f"field 'text', or chat data: {' or '.join(DIALOGUES)}, or one of {_ASKED} with one of {', '.join(ANSWER)}"


def document_of(row: Row, field: str, source: str) -> str:
    """The text in `field` (if that is empty, in 'text'), or else the chat data of the row's columns, written as a chat. InputError, naming
    `source`, for a row that has none of them, or a dialogue that does not alternate from a user to an assistant.

    >>> document_of({"instruction": "Add.", "input": "1 + 1", "output": "2"}, "", "row 1")
    'User: Add.\\n1 + 1\\n\\nAssistant: 2\\n\\n'
    """
    held = present(row)
    if field or "text" in held:
        return text_field(row, field or "text", source)
    try:
        return _written(*turns_of(held, _messages_of(held)))
    except Unusable as error:
        raise InputError(f"{source}: {error}, which the chat template cannot express") from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _messages_of(row: Row) -> Messages:
    """The whole dialogue, read as prepare_pairs.py reads the prompts of pairs."""
    if dialogue := first_of(row, DIALOGUES):
        return to_messages(row[dialogue], dialogue, Notes())
    answer = first_of(row, ANSWER)
    lead = prompt_messages({name: value for name, value in row.items() if name != answer}, Notes())
    if not (answer and lead) or row.keys() & _PREFERRED:
        refuse(f"no field 'text', found {', '.join(map(repr, row)) or 'none'}; expected {_EXPECTED}")
    return [*lead, *to_messages(row[answer], answer, Notes(), "assistant")]


def _written(system: str, turns: tuple[str, ...]) -> str:
    if not turns or len(turns) % 2:
        refuse(f"the dialogue ends with {'a message from the user' if turns else 'no message'}; expected one from the assistant")
    written = render(Preference("", system, turns[:-1], turns[-1], ""), MODES["chat"], seed=0)
    return written.prompt + written.chosen if written.chosen else refuse("the last answer is empty")
