"""The forms in which data sets keep a preference, and how a row of each becomes a Preference.

A form is a function from a row to two dialogues, the chosen and the rejected one. What they share is the prompt, whatever the form.
A message has role and content, or from and value. Any form may also have score_chosen and score_rejected, and system (text).
"""

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rwkv_dpo.base.errors import InputError, refuse

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")

Row = Mapping[str, Any]
Messages = list[tuple[str, str]]  # (role, text), each role a value of _ROLES


@dataclass(frozen=True)
class Preference:
    """A dialogue and two answers to its last turn. `where`: the row it was read from, for messages; `turns`: user and assistant
    by turns, the first and the last by the user; `system` may be empty."""

    where: str
    system: str
    turns: tuple[str, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Dropped:
    """A row that is not used. `where`: the row, or what a malformed one was refused with; `reason`: what rows are counted by."""

    where: str
    reason: str


class Form(NamedTuple):
    """`columns` as messages name them, those `required` besides chosen and rejected, and how a row is read."""

    columns: str
    required: frozenset[str]
    dialogues: Callable[[Row], tuple[Messages, Messages]]


def to_preference(row: Row, where: str, form: str = "auto") -> Preference | Dropped:
    """Read one row in the form of that name, or ("auto") in the form that its columns tell.

    Dropped: no rejected or chosen answer (null or nothing in it), equal scores, dialogues that differ in more than their last
    message. InputError, naming the field: a column is missing or holds something else, a dialogue does not alternate or does not
    end with the assistant, prompts differ.

    >>> to_preference({"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}, "row 1")
    Preference(where='row 1', system='', turns=('Hi',), chosen='Hello!', rejected='Go away.')
    """
    if "rejected" not in row and "reject" in row:
        row = {**row, "rejected": row["reject"]}
    needed = {"chosen", "rejected"} if form == "auto" else {"chosen", "rejected"} | FORMS[form].required
    if not row.keys() >= needed:
        refuse(f"has the columns {', '.join(map(repr, row)) or 'none'}; {_known_forms(form)}")
    if not row["rejected"]:
        return Dropped(where, "no rejected answer")
    if not row["chosen"]:
        return Dropped(where, "empty answer")
    if _is_tie(row):
        return Dropped(where, "tie")
    chosen, rejected = FORMS[recognised(row) if form == "auto" else form].dialogues(row)
    for name, dialogue in (("chosen", chosen), ("rejected", rejected)):
        if dialogue[-1][0] != "assistant":
            refuse(f"field '{name}' ends with a message from the {dialogue[-1][0]}; expected the assistant")
    n = _n_shared(chosen, rejected)
    if not chosen[n][0] == rejected[n][0] == "assistant":
        refuse(f"fields 'chosen' and 'rejected' have different prompts: they part at message {n + 1} of the dialogue")
    system, turns = _alternating(chosen[: n + 1], _text(row, "system") if row.get("system") else "")
    if len(chosen) > n + 1 or len(rejected) > n + 1:
        return Dropped(where, "answers of several turns")
    return Preference(where, system, turns[:-1], chosen[-1][1], rejected[-1][1])


def recognised(row: Row) -> str:
    """The name of the form that the columns of a row with chosen and rejected answers tell."""
    chosen, prompt = row["chosen"], row.get("prompt")
    if "conversations" in row:
        return "sharegpt"
    if isinstance(chosen, list):
        return "ultrafeedback" if isinstance(prompt, str) else "trl"
    if "prompt" in row:
        is_hh = isinstance(prompt, str) and _HH_TURN.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:")
        return "hh" if is_hh else "plain"
    return "hh" if isinstance(chosen, str) and _HH_TURN.match(chosen) else "trl"


def _conversational(row: Row) -> tuple[Messages, Messages]:
    chosen, rejected = _messages(row["chosen"], "chosen"), _messages(row["rejected"], "rejected")
    prompt = row.get("prompt")
    if prompt is None:
        return chosen, rejected
    if isinstance(prompt, list):
        lead = _messages(prompt, "prompt")
        # Some data sets repeat the prompt in the answers' columns.
        is_repeated = _n_shared([*lead, ("", "")], chosen) == len(lead)
    else:
        lead = [("user", _text(row, "prompt"))]
        asked = [text.split() for role, text in chosen if role == "user"]
        is_repeated = bool(asked)
        if is_repeated and lead[0][1].split() not in asked:
            refuse("field 'prompt' is none of the user's messages in 'chosen'")
    return (chosen, rejected) if is_repeated else ([*lead, *chosen], [*lead, *rejected])


def _trl(row: Row) -> tuple[Messages, Messages]:
    if isinstance(row["chosen"], list):
        return _conversational(row)
    if "prompt" in row:
        return _plain(row)
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    prompt = _shared_words(chosen, rejected)
    return _answered([("user", prompt)], chosen[len(prompt) :], rejected[len(prompt) :])


def _sharegpt(row: Row) -> tuple[Messages, Messages]:
    lead = _messages(row["conversations"], "conversations")
    chosen, rejected = (_messages(row[name] if isinstance(row[name], list) else [row[name]], name) for name in ("chosen", "rejected"))
    return [*lead, *chosen], [*lead, *rejected]


def _hh(row: Row) -> tuple[Messages, Messages]:
    # Some copies keep the dialogue in a prompt column and the last answers in the others.
    lead = _text(row, "prompt") if row.get("prompt") else ""
    return _hh_messages(lead + _text(row, "chosen"), "chosen"), _hh_messages(lead + _text(row, "rejected"), "rejected")


def _plain(row: Row) -> tuple[Messages, Messages]:
    prompt = "" if row["prompt"] is None else _text(row, "prompt")
    return _answered([("user", prompt)], _text(row, "chosen"), _text(row, "rejected"))


FORMS = {
    "ultrafeedback": Form("prompt text, chosen and rejected messages", frozenset({"prompt"}), _conversational),
    "trl": Form("chosen and rejected, with prompt messages or beginning alike", frozenset(), _trl),
    "sharegpt": Form("conversations, chosen and rejected messages", frozenset({"conversations"}), _sharegpt),
    "hh": Form("chosen and rejected texts with Human: and Assistant: turns", frozenset(), _hh),
    "plain": Form("prompt, chosen and rejected (or reject) texts", frozenset({"prompt"}), _plain),
}


def _known_forms(form: str) -> str:
    listed = FORMS if form == "auto" else {form: FORMS[form]}
    return ("a row has " if form == "auto" else "--format ") + ", or ".join(f"{form.columns} ({name})" for name, form in listed.items())


def _answered(lead: Messages, chosen: str, rejected: str) -> tuple[Messages, Messages]:
    return [*lead, ("assistant", chosen)], [*lead, ("assistant", rejected)]


def _n_shared(chosen: Messages, rejected: Messages) -> int:
    """How many messages both dialogues begin with, the last of either left out; outer space does not count."""
    n = 0
    for (role, text), (other_role, other_text) in zip(chosen[:-1], rejected[:-1], strict=False):
        if role != other_role or text.strip() != other_text.strip():
            break
        n += 1
    return n


def _alternating(messages: Messages, system: str) -> tuple[str, tuple[str, ...]]:
    """The system message and the turns of a dialogue that ends with an answer."""
    if messages[0][0] == "system":
        system = messages[0][1]
    turns = messages[1:] if messages[0][0] == "system" else messages
    for i, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            number = i + 1 + len(messages) - len(turns)
            refuse(f"message {number} of the dialogue is from the {role}; expected the {('user', 'assistant')[i % 2]}")
    return system, tuple(text for _, text in turns)


def _messages(messages: object, field: str) -> Messages:
    if not isinstance(messages, list):
        refuse(f"field '{field}' is a {type(messages).__name__}; expected a list of messages")
    return [_message(message, f"field '{field}': message {i}") for i, message in enumerate(messages, start=1)]


def _message(message: object, source: str) -> tuple[str, str]:
    if not isinstance(message, Mapping) or not (message.keys() >= {"role", "content"} or message.keys() >= {"from", "value"}):
        refuse(f"{source}: expected a role and content, or from and value")
    role, content = ("role", "content") if message.keys() >= {"role", "content"} else ("from", "value")
    if (speaker := message[role]) not in list(_ROLES):
        refuse(f"{source}: is from {speaker!r}; accepted are {', '.join(_ROLES)}")
    try:
        return _ROLES[speaker], _text(message, content)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _hh_messages(text: str, field: str) -> Messages:
    lead, *turns = _HH_TURN.split(text)
    if not turns:
        refuse(f"field '{field}' has no Human: and Assistant: turns")
    messages = [(_ROLES[name.lower()], said) for name, said in zip(turns[::2], turns[1::2], strict=True)]
    return [("system", lead), *messages] if lead.strip() else messages


def _shared_words(chosen: str, rejected: str) -> str:
    """What both texts begin with, to the end of its last whole word (in scripts without spaces, to its last character)."""
    n = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    is_within_word = re.search(r"\w\Z", chosen[:n]) and any(re.match(r"\w", text[n:]) for text in (chosen, rejected))
    return re.sub(r"(\s)\S+\Z", r"\1", chosen[:n]) if is_within_word else chosen[:n]


def _is_tie(row: Row) -> bool:
    scores = [row.get("score_chosen"), row.get("score_rejected")]
    if None in scores or "" in scores:
        return False
    try:
        chosen, rejected = (float(score) for score in scores)  # type: ignore[arg-type]  # what is no number raises
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"fields 'score_chosen' and 'score_rejected' are {scores[0]!r} and {scores[1]!r}; expected numbers") from error
    return chosen == rejected


def _text(row: Row, field: str) -> str:
    text = row.get(field)
    if not isinstance(text, str):
        refuse(f"field '{field}' is a {type(text).__name__}; expected text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"field '{field}' has a lone surrogate at character {error.start}") from error
    return text
