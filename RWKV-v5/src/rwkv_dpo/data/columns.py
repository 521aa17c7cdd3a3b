"""The meaning of a row's columns: the names that data sets give to prompt, system message, answers and their scores."""

import re
from collections.abc import Mapping
from typing import Any

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.preference import Row, Unusable, is_missing, number_of

# In the order in which they are taken for the prompt; if a row has several, the others are checked against it or added to it.
PROMPTS = (
    "prompt", "conversations", "conversation", "messages", "dialogue", "question", "instruction", "query", "problem", "input", "history",
    "context",
)  # fmt: skip
DIALOGUES = ("conversations", "conversation", "messages", "dialogue")
# Columns that may accompany a prompt and belong to it; the others of PROMPTS are prompts themselves.
BEFORE, AFTER = ("history", "context"), ("input",)
SYSTEMS = ("system", "system_prompt", "system_message", "developer")
CHOSEN = (
    "chosen", "preferred_output", "preferred_completion", "chosen_response", "response_chosen", "chosen_answer", "chosen_messages",
    "good_edited_response",
)  # fmt: skip
REJECTED = (
    "rejected", "reject", "non_preferred_output", "non_preferred_completion", "rejected_response", "response_rejected", "rejected_answer",
    "rejected_messages", "bad_edited_response",
)  # fmt: skip
ANSWERS = ("answers", "completions", "responses", "generations", "candidates", "all_generated_responses")
SCORES = ("scores", "ratings", "rating", "rewards", "all_rm_scores")
RANKS = ("ranks", "rank", "ranking", "rankings")
ANSWER = ("completion", "response", "answer", "output")
LABEL = ("label", "kto_tag", "thumbs", "thumbs_up", "desirable")
SCORE = ("score", "helpfulness", "rating", "overall_score", "reward")

# The roles of --columns, and the names that data sets give them.
ROLES = {
    "prompt": PROMPTS, "system": SYSTEMS, "context": ("context",), "chosen": CHOSEN, "rejected": REJECTED, "answers": ANSWERS,
    "scores": SCORES, "ranks": RANKS, "answer": ANSWER, "label": LABEL, "score": SCORE, "chosen_score": (), "rejected_score": (),
}  # fmt: skip
_CANONICAL = {role: names[0] if names else role for role, names in ROLES.items()}
_MARGINS = ("margin", "score_margin", "rating_margin", "preference_margin")
_CHOSEN_SCORE = re.compile(r"chosen[_-](?:\w+[_-])?(?:score|rating|reward)|(?:score|rating|reward)[_-]chosen", re.IGNORECASE)
# Text columns that describe a row and are not part of it.
_ABOUT = re.compile(
    r"(?:.*[_-])?(?:u?u?id|source|dataset|model|models|category|categories|type|task|topic|domain|language|lang|split|subset|name|url|date|"
    r"time|timestamp|hash|sha\d*|index|score|rating|reward|rationale|critique|feedback|tags?|status|license|version|annotator|worker|"
    r"reason|comment|label|margin|file|path|metadata|meta|origin|key|batch|difficulty|level|quality|subreddit|title)s?",
    re.IGNORECASE,
)


def parse_columns(text: str) -> dict[str, str]:
    """--columns: "prompt=question,chosen=good" as {"prompt": "question", "chosen": "good"}; a dot reaches into an object. InputError for
    anything else.
    """
    named: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or role not in ROLES:
            refuse(f"--columns {text}: {part!r} is not ROLE=COLUMN, with a ROLE of {', '.join(ROLES)}")
        if role in named:
            refuse(f"--columns {text}: names {role} twice")
        named[role] = column
    return named


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """The row with its columns under the names that forms know: those given by --columns, and the usual ones for the answers of a pair. A
    role that is given has no other column. InputError if the column doesn't exist."""
    if columns:
        values = {role: _found(row, column, role) for role, column in columns.items()}
        hidden = {name for role in columns for name in ROLES[role]} - {"context", "input", "history"} | set(columns.values())
        row = {name: value for name, value in row.items() if name not in hidden}
        row = {**row, **{_CANONICAL[role]: value for role, value in values.items()}}
    for canonical, names in (("chosen", CHOSEN), ("rejected", REJECTED)):
        other = next((name for name in names if name in row), None)
        if canonical not in row and other:
            row = {**row, canonical: row[other]}
    return row


def _found(row: Row, column: str, role: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, Mapping) or part not in value:
            refuse(f"has the columns {', '.join(map(repr, row)) or 'none'}; --columns {role}={column} matches none of them")
        value = value[part]
    return value


def present(row: Row) -> dict[str, Any]:
    """The columns with content: tables pad rows with nulls."""
    return {name: value for name, value in row.items() if not is_missing(value)}


def first_of(row: Row, names: tuple[str, ...]) -> str | None:
    """The first of these names that the row has."""
    return next((name for name in names if name in row), None)


def unknown_texts(row: Row) -> list[str]:
    """Text columns that may be a prompt under an unknown name."""
    known = {name for names in ROLES.values() for name in names}
    return [
        name
        for name, value in row.items()
        if isinstance(value, str) and value.strip() and name not in known and not _ABOUT.fullmatch(name)
    ]


def scores_of(row: Row) -> tuple[float, float] | None:
    """The scores of the chosen and the rejected answer; (margin, 0) if there is only a margin; None without any. Unusable for a tie, or if
    the rejected answer has the better score."""
    found = []
    for name in row:
        if _CHOSEN_SCORE.fullmatch(name):
            other = re.sub("chosen", "rejected", name, flags=re.IGNORECASE)
            scores = [number_of(row[one], one) if one in row else None for one in (name, other)]
            if scores[0] is not None and scores[1] is not None:
                found.append((scores[0], scores[1]))
    for name in _MARGINS:
        if (margin := number_of(row.get(name), name)) is not None:
            found.append((margin, 0.0))
    gaps = [chosen - rejected for chosen, rejected in found]
    if any(gap < 0 for gap in gaps):
        raise Unusable("scores contradict")
    # distilabel writes this if both got the same rating.
    if (gaps and not any(gaps)) or row.get("status") == "tie":
        raise Unusable("tie")
    return next((scores for scores, gap in zip(found, gaps, strict=True) if gap), None)
