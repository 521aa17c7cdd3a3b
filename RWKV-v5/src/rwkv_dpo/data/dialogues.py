"""The dialogue before a row's answers, put together from all the columns that belong to it. None of them is dropped silently."""

from collections.abc import Mapping
from typing import Any

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.chat_marks import WRAPPED, unwrapped_prompt
from rwkv_dpo.data.columns import AFTER, BEFORE, DIALOGUES, PROMPTS, SYSTEMS, first_of
from rwkv_dpo.data.messages import IMAGES, is_messages, to_messages
from rwkv_dpo.data.preference import Messages, Notes, Row, text_of

# Characters: "2" is contained in "What is 2 + 3?" and may still be an input of its own.
_BY_CHANCE = 30


def prompt_messages(row: Row, notes: Notes, unwraps: bool = True) -> Messages:
    """The dialogue before the answers, without system columns. `unwraps`: a prompt that carries a chat template is split into turns. A
    history and a context come before the question, an input after it, unless it contains them already. InputError if two columns look like
    the prompt.
    """
    name = first_of(row, PROMPTS)
    if name is None:
        return []
    messages = _read(row[name], name, notes, unwraps)
    if isinstance(row.get("images"), list):
        notes.counts[IMAGES] += len(row["images"])
    for other in PROMPTS[PROMPTS.index(name) + 1 :]:
        if other in row and not _is_empty(row[other]):
            messages = _with(messages, row[other], other, name, notes)
    return messages


def context_of(row: Row, dialogue: Messages, notes: Notes) -> Messages:
    """A whole dialogue, including its answer, with the texts of other columns (input, context, history) that it does not contain."""
    lead, answer = dialogue[:-1], dialogue[-1:]
    for name in (*BEFORE, *AFTER):
        if name in row and not is_messages(row[name]) and not _is_empty(row[name]):
            lead = _with(lead, row[name], name, "chosen", notes)
    return [*lead, *answer]


def system_of(row: Row, messages: Messages) -> tuple[str, Messages]:
    """The system message, from the columns and the dialogue, and the dialogue without it."""
    texts = [text_of(row[name], name) for name in SYSTEMS if name in row and not _is_empty(row[name])]
    if messages and messages[0][0] == "system":
        texts.append(messages[0][1])
        messages = messages[1:]
    told: list[str] = []
    for text in texts:
        if not any(_holds(other, text) for other in told):
            told = [*(other for other in told if not _holds(text, other)), text]
    return "\n".join(told), messages


def turns_of(row: Row, messages: Messages) -> tuple[str, tuple[str, ...]]:
    """The system message and the turns of a dialogue. InputError if they don't alternate, the user first."""
    has_system = bool(messages) and messages[0][0] == "system"
    system, turns = system_of(row, messages)
    for i, (role, _) in enumerate(turns):
        if role != ("user", "assistant")[i % 2]:
            refuse(f"message {i + 1 + has_system} of the dialogue is from the {role}; expected the {('user', 'assistant')[i % 2]}")
    return system, tuple(text for _, text in turns)


def _read(value: Any, name: str, notes: Notes, unwraps: bool) -> Messages:
    # WebGPT's question
    if isinstance(value, Mapping) and "full_text" in value:
        value = value["full_text"]
    if isinstance(value, str) and unwraps and (messages := unwrapped_prompt(value)):
        notes.counts[WRAPPED] += 1
        return messages
    return to_messages(value, name, notes, speaker="" if name in DIALOGUES else "user")


def _with(messages: Messages, value: Any, name: str, first: str, notes: Notes) -> Messages:
    """The dialogue with that column added to it."""
    if is_messages(value):
        more = to_messages(value, name, notes)
        if name in BEFORE:
            n = int(messages[0][0] == "system")
            return [*messages[:n], *more, *messages[n:]]
        said = [text.split() for role, text in more if role == "user"]
        if messages and messages[-1][1].split() in said:
            # The whole dialogue, next to its last or first question.
            more = more[:-1] if more[-1][0] == "assistant" else more
            return more if len(more) > len(messages) else messages
        refuse(f"fields '{first}' and '{name}' are two prompts; --columns prompt={first} or prompt={name} selects one")
    text = text_of(value, name)
    if any(_holds(said, text) for _, said in messages):
        return messages
    at = max((i for i, (role, _) in enumerate(messages) if role == "user"), default=None)
    if at is None:
        refuse(f"field '{name}' belongs to a question, but there is none")
    if name not in (*BEFORE, *AFTER):
        # A question within the prompt is not a second one, however short.
        if any(text.strip() in said for _, said in messages):
            return messages
        if _holds(text, messages[at][1]):
            return [*messages[:at], ("user", text), *messages[at + 1 :]]
        refuse(f"fields '{first}' and '{name}' are two prompts; --columns prompt={first} or prompt={name} selects one")
    question = messages[at][1]
    joined = f"{text}\n\n{question}" if name in BEFORE else f"{question}\n{text}"
    return [*messages[:at], ("user", joined), *messages[at + 1 :]]


def _holds(text: str, part: str) -> bool:
    """Whether a text has that part as its first or last lines, or, if it is too long to be there by chance, anywhere."""
    text, part = ("\n".join(" ".join(line.split()) for line in one.splitlines() if line.strip()) for one in (text, part))
    return f"\n{text}\n".startswith(f"\n{part}\n") or f"\n{text}\n".endswith(f"\n{part}\n") or (len(part) > _BY_CHANCE and part in text)


def _is_empty(value: Any) -> bool:
    return value in ("", [], {}) or (isinstance(value, str) and not value.strip())
