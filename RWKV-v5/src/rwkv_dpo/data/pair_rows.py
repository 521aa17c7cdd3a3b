"""Rows with a chosen and a rejected answer: as text, as messages, or as whole dialogues with a common beginning."""

import itertools
import re
from typing import Any

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.chat_marks import WRAPPED, unwrapped_answer, unwrapped_dialogue, unwrapped_prompt
from rwkv_dpo.data.columns import DIALOGUES, PROMPTS, first_of, scores_of, unknown_texts
from rwkv_dpo.data.dialogues import context_of, prompt_messages, turns_of
from rwkv_dpo.data.messages import is_messages, to_messages, unprinted
from rwkv_dpo.data.preference import Messages, Notes, Preference, Ranking, Row, Unusable, text_of

HH_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
PAIR, BEGINNING_ALIKE = "pairs with a prompt", "pairs with a common beginning"


def read_pair(row: Row, where: str, notes: Notes, form: str) -> Preference | Ranking:
    """A row with chosen and rejected, in the form of that name (forms.FORMS). InputError for a malformed one, Unusable for one without
    a preference."""
    if not row.get("rejected"):
        raise Unusable("no rejected answer")
    if not (row.get("chosen") or ("chosen" not in row and first_of(row, DIALOGUES))):
        raise Unusable("empty answer")
    scores = scores_of(row)
    if form not in ("hh", "plain", "trl") and (several := _several(row)):
        system, turns = turns_of(row, prompt_messages(row, notes))
        return Ranking(where, system, turns, *several)
    chosen, rejected = _dialogues(row, notes, form)
    for name, dialogue in (("chosen", chosen), ("rejected", rejected)):
        if dialogue[-1][0] != "assistant":
            refuse(f"field '{name}' ends with a message from the {dialogue[-1][0]}; expected the assistant")
    n = _n_shared(chosen, rejected)
    if not chosen[n][0] == rejected[n][0] == "assistant":
        refuse(f"fields 'chosen' and 'rejected' have different prompts: they part at message {n + 1} of the dialogue")
    system, turns = turns_of(row, chosen[: n + 1])
    if len(chosen) > n + 1 or len(rejected) > n + 1:
        raise Unusable("answers of several turns")
    return Preference(where, system, turns[:-1], chosen[-1][1], rejected[-1][1], scores)


def _several(row: Row) -> tuple[tuple[str, ...], tuple[float, ...]] | None:
    """The answers and scores of rows whose chosen and rejected are lists of texts, of which one at least has several."""
    lists = [row.get("chosen"), row.get("rejected")]
    if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in lists):
        return None
    chosen, rejected = ([text_of(text, name) for text in row[name]] for name in ("chosen", "rejected"))
    if len(chosen) == len(rejected) == 1:
        return None
    return (*chosen, *rejected), (*[1.0] * len(chosen), *[0.0] * len(rejected))


def _dialogues(row: Row, notes: Notes, form: str) -> tuple[Messages, Messages]:
    if "chosen" not in row:
        return _with_chosen_in_dialogue(row, notes)
    if form == "hh":
        return _hh(row)
    values = [unprinted(row[name], name) for name in ("chosen", "rejected")]
    if not any(map(is_messages, values)):
        return _texts(row, notes, form)
    chosen, rejected = (
        to_messages(value, name, notes, speaker="" if _is_whole(other) else "assistant")
        for value, other, name in zip(values, values[::-1], ("chosen", "rejected"), strict=True)
    )
    if not any(role == "user" for role, _ in chosen):
        lead = prompt_messages(row, notes)
        return [*lead, *chosen], [*lead, *rejected]
    lead = _unrepeated(row, chosen, notes)
    return context_of(row, [*lead, *chosen], notes), context_of(row, [*lead, *rejected], notes)


def _is_whole(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1


def _unrepeated(row: Row, chosen: Messages, notes: Notes) -> Messages:
    """What stands before dialogues that have turns of the user, by the prompt column; mostly nothing, since they repeat it."""
    name = first_of(row, PROMPTS)
    if name is None or (name in ("input", "history", "context") and not is_messages(row[name])):
        return []
    if isinstance(row[name], str) and not is_messages(row[name]):
        lead = unwrapped_prompt(row[name]) or [("user", text_of(row[name], name))]
    else:
        lead = to_messages(row[name], name, notes)
    asked = [text.split() for role, text in chosen if role == "user"]
    if all(text.split() in asked for role, text in lead if role == "user"):
        return lead[:1] if lead and lead[0][0] == "system" and chosen[0][0] != "system" else []
    if isinstance(row[name], str):
        if name == "prompt":
            refuse("field 'prompt' is none of the user's messages in 'chosen'")
        return []
    return lead


def _with_chosen_in_dialogue(row: Row, notes: Notes) -> tuple[Messages, Messages]:
    """ms-swift: the last message of the dialogue is the chosen answer."""
    name = first_of(row, DIALOGUES) or refuse("has no chosen answer")
    chosen = context_of(row, to_messages(row[name], name, notes), notes)
    rejected = to_messages(row["rejected"], "rejected", notes, speaker="assistant")
    is_whole = any(role == "user" for role, _ in rejected)
    return chosen, context_of(row, rejected, notes) if is_whole else [*chosen[:-1], *rejected]


def _texts(row: Row, notes: Notes, form: str) -> tuple[Messages, Messages]:
    chosen, rejected = (text_of(value[0] if isinstance(value, list) and len(value) == 1 else value, name)
                        for name in ("chosen", "rejected") for value in (row[name],))  # fmt: skip
    is_literal = form in ("plain", "trl")
    before = notes.counts[WRAPPED]
    lead = prompt_messages(row, notes, unwraps=not is_literal)
    if notes.counts[WRAPPED] > before:
        chosen, rejected = unwrapped_answer(chosen), unwrapped_answer(rejected)
    if not lead and not is_literal and (whole := (unwrapped_dialogue(chosen), unwrapped_dialogue(rejected))) and whole[0] and whole[1]:
        notes.counts[WRAPPED] += 1
        return context_of(row, whole[0], notes), context_of(row, whole[1], notes)
    if not lead and form != "trl" and (unknown := unknown_texts(row)):
        refuse(
            f"has the columns {', '.join(map(repr, row))}, and none is known as the prompt; --columns prompt={unknown[0]} names it, "
            "--format trl takes what both answers begin with"
        )
    notes.agree(PAIR if lead else BEGINNING_ALIKE)
    if not lead:
        words = shared_words(chosen, rejected)
        lead, chosen, rejected = [("user", words)], chosen[len(words) :], rejected[len(words) :]
    return [*lead, ("assistant", chosen)], [*lead, ("assistant", rejected)]


def _hh(row: Row) -> tuple[Messages, Messages]:
    # Some copies keep the dialogue in a prompt column and the last answers in the others.
    lead = text_of(row["prompt"], "prompt") if row.get("prompt") else ""
    chosen, rejected = (_hh_messages(lead + text_of(row[name], name), name) for name in ("chosen", "rejected"))
    return chosen, rejected


def _hh_messages(text: str, field: str) -> Messages:
    lead, *turns = HH_TURN.split(text)
    if not turns:
        refuse(f"field '{field}' has no Human: and Assistant: turns")
    messages = [(_HH_ROLES[name], said) for name, said in zip(turns[::2], turns[1::2], strict=True)]
    return [("system", lead), *messages] if lead.strip() else messages


def _n_shared(chosen: Messages, rejected: Messages) -> int:
    """How many messages both dialogues begin with, the last of either left out; outer space does not count."""
    n = 0
    for (role, text), (other_role, other_text) in zip(chosen[:-1], rejected[:-1], strict=False):
        if role != other_role or text.strip() != other_text.strip():
            break
        n += 1
    return n


def shared_words(chosen: str, rejected: str) -> str:
    """What both texts begin with, to the end of its last whole word (in scripts without spaces, to its last character)."""
    n = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    is_within_word = re.search(r"\w\Z", chosen[:n]) and any(re.match(r"\w", text[n:]) for text in (chosen, rejected))
    return re.sub(r"(\s)\S+\Z", r"\1", chosen[:n]) if is_within_word else chosen[:n]
