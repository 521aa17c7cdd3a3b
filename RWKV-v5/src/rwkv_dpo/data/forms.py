"""The forms in which data sets store preferences: which columns identify each, and what reads a row of it.

A form is recognized by the columns with content; a form named by --format has to have them, too. A row that matches none is refused with
the closest forms: a wrong guess would be trained on.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, NoReturn

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.columns import ANSWER, ANSWERS, DIALOGUES, LABEL, PROMPTS, RANKS, SCORE, SCORES, present, renamed
from rwkv_dpo.data.messages import is_messages, parsed
from rwkv_dpo.data.pair_rows import HH_TURN, PAIR, read_pair
from rwkv_dpo.data.preference import Dropped, Notes, Preference, Ranking, Row, Unusable
from rwkv_dpo.data.rated_rows import (
    Scores,
    by_label,
    by_number,
    by_scores,
    by_strength,
    read_arena,
    read_list,
    read_one,
    read_summaries,
    read_two,
)  # fmt: skip

RANKING, ONE_ANSWER = "rankings", "one answer a row"
_Reader = Callable[..., Preference | Ranking]
_Names = tuple[str, ...]


class Form(NamedTuple):
    """`columns` as messages name them, the published sets that have them, the required columns (of each tuple at least one), the kind
    shared by all rows of a file (empty: pairs, and the reader says which), and the reader of a row."""

    columns: str
    sets: str
    required: tuple[_Names, ...]
    kind: str
    read: _Reader


def _pair(columns: str, sets: str, *required: _Names) -> Form:
    return Form(columns, sets, (*required, ("rejected",)), "", read_pair)


def _two(columns: str, sets: str, answers: tuple[str, str], *required: str, scores: Callable[[Row], Scores]) -> Form:
    needed = tuple((name,) for name in (*answers, *required))
    return Form(columns, sets, needed, RANKING, partial(read_two, answers=answers, scores=scores))


def _read_pair(row: Row, where: str, notes: Notes, form: str) -> Preference | Ranking:
    if is_messages(row.get("chosen")):
        notes.agree(PAIR)
    return read_pair(row, where, notes, form)


_BOTH = ("chosen",)

FORMS: dict[str, Form] = {
    "openai": _pair("input with messages, preferred_output and non_preferred_output", "OpenAI's preference fine-tuning",
                    ("input",), ("preferred_output", "preferred_completion")),
    "swift": _pair("messages that end with the chosen answer, and rejected_response or rejected_messages", "ms-swift", DIALOGUES),
    "sharegpt": _pair("conversations, chosen and rejected messages", "LLaMA-Factory", DIALOGUES, _BOTH),
    "alpaca": _pair("instruction (and input, history), with chosen and rejected or output as [better, worse]", "LLaMA-Factory, argilla",
                    ("instruction",), _BOTH),
    "orca": _pair("question or input (and system), chosen and rejected", "orca_dpo_pairs, distilabel",
                  ("question", "input", "query", "problem", "history", "context"), _BOTH),
    "ultrafeedback": _pair("prompt text, chosen and rejected messages", "ultrafeedback_binarized", ("prompt",), _BOTH),
    "trl": _pair("chosen and rejected, with prompt messages or a common beginning", "TRL", _BOTH),
    "hh": _pair("chosen and rejected texts with Human: and Assistant: turns", "Anthropic's hh-rlhf", _BOTH),
    "plain": _pair("prompt, chosen and rejected (or reject) texts", "many", ("prompt",), _BOTH),
    "helpsteer2_preference": _two("prompt, response_1, response_2 and preference_strength", "HelpSteer2-preference",
                                  ("response_1", "response_2"), "preference_strength", scores=by_strength("preference_strength")),
    "helpsteer3": _two("context messages, response1, response2 and overall_preference", "HelpSteer3",
                       ("response1", "response2"), "overall_preference", scores=by_strength("overall_preference")),
    "shp": _two("history, human_ref_A, human_ref_B and labels", "SHP, SHP-2", ("human_ref_A", "human_ref_B"), "labels", scores=by_label),
    "safe_rlhf": _two("prompt, response_0, response_1 and better_response_id", "PKU-SafeRLHF",
                      ("response_0", "response_1"), "better_response_id", scores=by_number("better_response_id")),
    "webgpt": _two("question, answer_0, answer_1, score_0 and score_1", "webgpt_comparisons",
                   ("answer_0", "answer_1"), "score_0", "score_1", scores=by_scores),
    "arena": Form("conversation_a, conversation_b and winner", "chatbot_arena_conversations",
                  (("conversation_a",), ("conversation_b",), ("winner",)), RANKING, read_arena),
    "summaries": Form("info, summaries and choice", "summarize_from_feedback",
                      (("info",), ("summaries",), ("choice",)), RANKING, read_summaries),
    "ranked": Form("a prompt and a list of answers, completions or responses, with scores, ratings or ranks next to or inside them",
                   "UltraFeedback, Nectar", (PROMPTS, ANSWERS), RANKING, read_list),
    "kto": Form("prompt, completion and label, or messages and label", "TRL's, LLaMA-Factory's and ms-swift's KTO",
                ((*ANSWER, *DIALOGUES), LABEL), ONE_ANSWER, partial(read_one, is_labelled=True)),
    "rated": Form("prompt, response and helpfulness, score or rating", "HelpSteer, HelpSteer2", (PROMPTS, ANSWER, SCORE), ONE_ANSWER,
                  partial(read_one, is_labelled=False)),
}  # fmt: skip


def to_preference(
    row: Row, where: str, form: str = "auto", columns: Mapping[str, str] | None = None, notes: Notes | None = None
) -> Preference | Ranking | Dropped:
    """Read one row in the form of that name, or ("auto") in the form that its columns match. `columns`: --columns, as columns.renamed takes
    it. `notes`: of the file, or of this row only.

    Dropped: no rejected or chosen answer (null or nothing in it), equal or contradicting scores, dialogues with tools or that differ in
    more than their last message. InputError, naming the field: a column is missing or holds something else, a dialogue does not
    alternate or does not end with the assistant, prompts differ.

    >>> to_preference({"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}, "row 1")
    Preference(where='row 1', system='', turns=('Hi',), chosen='Hello!', rejected='Go away.')
    """
    notes = notes or Notes()
    given = renamed(row, columns or {})
    held = _with_output_pair(present(given))
    name = form if form != "auto" else recognised(given)
    if not _told_by(FORMS[name], {**given, **held}):
        refuse(f"has the columns {_columns_of(given)}; --format {name} is for {FORMS[name].columns}")
    if name == "plain":
        held = {"prompt": "", **held}
    try:
        if FORMS[name].kind:
            notes.agree(FORMS[name].kind)
            return FORMS[name].read(held, where, notes)
        # A form named as "plain" or "trl" is taken literally; a row that only looks like one is examined.
        return _read_pair(held, where, notes, name if form != "auto" or name == "hh" else "")
    except Unusable as unusable:
        return Dropped(where, str(unusable))


def recognised(row: Row) -> str:
    """The name of the form that the columns of a row, as returned by columns.renamed, match. InputError, with the closest ones, if they
    match none."""
    held = _with_output_pair(present(row))
    if "chosen" in held and "rejected" in held:
        return _recognised_pair(row, held)
    others = [name for name, form in FORMS.items() if form.kind and _told_by(form, held)]
    if "ranked" in others and not _is_ranked(held):
        others.remove("ranked")
    if others:
        return others[0]
    if "chosen" not in row and _told_by(FORMS["swift"], {**row, **held}):
        return "swift"
    # A null has no type: the pair that it should be determines the form, and the row is dropped.
    if "chosen" in row and "rejected" in row:
        return _recognised_pair(row, held)
    _refuse_unknown(row)


def _recognised_pair(row: Row, held: Row) -> str:
    chosen, prompt = held.get("chosen"), held.get("prompt")
    if _told_by(FORMS["openai"], held):
        return "openai"
    if any(name in held and (name != "messages" or not is_messages(chosen)) for name in DIALOGUES):
        return "sharegpt"
    if is_messages(chosen):
        return "ultrafeedback" if isinstance(prompt, str) else "trl"
    if prompt is not None:
        is_hh = isinstance(prompt, str) and HH_TURN.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:")
        return "hh" if is_hh else "plain"
    if isinstance(chosen, str) and HH_TURN.match(chosen):
        return "hh"
    if any(name in held for name in PROMPTS):
        return "alpaca" if "instruction" in held else "orca"
    return "plain" if "prompt" in row else "trl"


def _with_output_pair(row: dict[str, object]) -> dict[str, object]:
    """LLaMA-Factory's older form, output as [better, worse], as a chosen and a rejected answer."""
    output = row.get("output")
    if isinstance(output, str) and output.lstrip().startswith("["):
        output = parsed(output)
    is_pair = isinstance(output, list) and len(output) == 2 and all(isinstance(text, str) for text in output)
    if not is_pair or {"chosen", "rejected"} & row.keys() or "instruction" not in row:
        return row
    rest = {name: value for name, value in row.items() if name != "output"}
    return {**rest, "chosen": output[0], "rejected": output[1]}  # type: ignore[index]


def _is_ranked(row: Row) -> bool:
    answers = row[next(name for name in ANSWERS if name in row)]
    is_within = isinstance(answers, str) or answers == [] or (isinstance(answers, list) and isinstance(answers[0], Mapping))
    return is_within or any(name in row for name in (*SCORES, *RANKS))


def _told_by(form: Form, row: Row) -> bool:
    return all(any(name in row for name in names) for names in form.required)


def _columns_of(row: Row) -> str:
    return ", ".join(map(repr, row)) or "none"


def _refuse_unknown(row: Row) -> NoReturn:
    def nearness(form: Form) -> float:
        return sum(any(name in row for name in names) for names in form.required) / len(form.required)

    # Among equals, those with more missing columns come last.
    nearest = sorted(FORMS, key=lambda name: (-nearness(FORMS[name]), name not in ("plain", "ultrafeedback", "ranked")))[:3]
    listed = ", or ".join(f"{FORMS[name].columns} ({name})" for name in nearest)
    refuse(f"has the columns {_columns_of(row)}; a row has {listed}; --columns prompt=...,chosen=...,rejected=... names others")
