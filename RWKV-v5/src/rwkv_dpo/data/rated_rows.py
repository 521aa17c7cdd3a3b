"""Rows whose answers are rated: two with a label, several with scores or ranks, or one alone, to be gathered with others."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.columns import ANSWER, ANSWERS, DIALOGUES, LABEL, RANKS, SCORE, SCORES, first_of
from rwkv_dpo.data.dialogues import prompt_messages, turns_of
from rwkv_dpo.data.messages import parsed, to_messages
from rwkv_dpo.data.preference import Messages, Notes, Ranking, Row, Unusable, is_missing, number_of

UNSCORED = "answers without a score were left out"
_TEXT = ("response", "answer", "completion", "text", "content", "output", "generated_text")
_GOOD = {**dict.fromkeys(("true", "1", "good", "up", "desirable", "positive", "yes", "chosen", "like"), 1.0),
         **dict.fromkeys(("false", "0", "-1", "bad", "down", "undesirable", "negative", "no", "rejected", "dislike"), 0.0)}  # fmt: skip
Scores = tuple[float | None, float | None]


def read_list(row: Row, where: str, notes: Notes) -> Ranking:
    """Answers in a list, with scores (higher is better) or ranks (1 is the best) beside them or within.

    A completion of UltraFeedback has its fine-grained score, or the mean of its aspects' ratings, or its overall score: the last is
    known to be wrong for some of them.
    """
    name = first_of(row, ANSWERS) or refuse("has no list of answers")
    answers = _as_list(row[name], name)
    if not answers:
        raise Unusable("no answers")
    beside = first_of(row, SCORES) or first_of(row, RANKS)
    is_within = all(isinstance(answer, Mapping) for answer in answers) and (beside is None or any(map(_score_within, answers)))
    if is_within:
        scores = [_score_within(answer) for answer in answers]
    else:
        beside = beside or refuse(f"has answers in '{name}', and neither scores nor ranks of them")
        values = [number_of(value, beside) for value in _as_list(row[beside], beside)]
        if len(values) != len(answers):
            refuse(f"field '{beside}' has {len(values)} values for the {len(answers)} answers in '{name}'")
        scores = [None if value is None else -value if beside in RANKS else value for value in values]
    texts = [_text(answer, f"{name} {i}", notes) for i, answer in enumerate(answers, start=1)]
    return _ranked(row, where, texts, scores, prompt_messages(row, notes), notes)


def read_two(row: Row, where: str, notes: Notes, answers: tuple[str, str], scores: Callable[[Row], Scores]) -> Ranking:
    """Two answers in columns of their own, and what tells the better one."""
    texts = [_text(row[name], name, notes) for name in answers]
    return _ranked(row, where, texts, list(scores(row)), prompt_messages(row, notes), notes)


def read_arena(row: Row, where: str, notes: Notes) -> Ranking:
    """Chatbot Arena: two whole dialogues with one question, of which a judge preferred one."""
    first, second = (to_messages(row[name], name, notes) for name in ("conversation_a", "conversation_b"))
    if first[:-1] != second[:-1]:
        raise Unusable("answers of several turns")
    winner = str(row["winner"])
    scores: list[float | None] = [float(winner == "model_a"), float(winner == "model_b")]
    return _ranked(row, where, [first[-1][1], second[-1][1]], scores, first[:-1], notes)


def read_summaries(row: Row, where: str, notes: Notes) -> Ranking:
    """summarize_from_feedback: two summaries of a post or an article, the prompt as its paper writes it."""
    summaries, info = row["summaries"], row["info"]
    if not isinstance(info, Mapping) or not isinstance(summaries, list) or row["choice"] not in range(len(summaries)):
        refuse(f"field 'choice' is {row['choice']!r}; expected the number of one of the summaries, from 0")
    if info.get("article"):
        lines = [f"{info['article']}"]
    else:
        names = (("subreddit", "SUBREDDIT: r/"), ("title", "TITLE: "), ("post", "POST: "))
        lines = [f"{title}{info[name]}" for name, title in names if info.get(name)]
    texts = [_text(summary, f"summaries {i}", notes) for i, summary in enumerate(summaries, start=1)]
    scores: list[float | None] = [float(i == row["choice"]) for i in range(len(texts))]
    return _ranked(row, where, texts, scores, [("user", "\n\n".join([*lines, "TL;DR:"]))], notes)


def read_one(row: Row, where: str, notes: Notes, is_labelled: bool) -> Ranking:
    """One answer with a thumb (KTO) or a rating (HelpSteer): part of the ranking of its prompt."""
    if dialogue := None if first_of(row, ANSWER) else first_of(row, DIALOGUES):
        *lead, (role, answer) = to_messages(row[dialogue], dialogue, notes) or refuse(f"field '{dialogue}' has no message")
        if role != "assistant":
            refuse(f"field '{dialogue}' ends with a message from the {role}; expected the assistant")
    else:
        name = first_of(row, ANSWER) or refuse("has no answer")
        answer = _text(row[name], name, notes)
        lead = prompt_messages({key: value for key, value in row.items() if key != name}, notes)
    if is_labelled:
        name = first_of(row, LABEL) or refuse("has no label")
        score = _GOOD.get(str(row[name]).strip().lower().removesuffix(".0"))
        if score is None:
            refuse(f"field '{name}' is {row[name]!r}; expected true or false")
    else:
        name = first_of(row, SCORE) or refuse("has no score")
        score = number_of(row[name], name)
    ranking = _ranked(row, where, [answer], [score], lead, notes)
    return Ranking(where, ranking.system, ranking.turns, ranking.answers, ranking.scores, is_part=True)


def _ranked(row: Row, where: str, texts: list[str], scores: list[float | None], lead: Messages, notes: Notes) -> Ranking:
    system, turns = turns_of(row, lead)
    if len(turns) % 2 == 0:
        refuse("the dialogue ends with a message from the assistant; expected a question" if turns else "has no prompt before its answers")
    kept = [(text, score) for text, score in zip(texts, scores, strict=True) if score is not None]
    if not kept:
        raise Unusable("no scores")
    if len(kept) < len(texts):
        notes.counts[UNSCORED] += len(texts) - len(kept)
    return Ranking(where, system, turns, tuple(text for text, _ in kept), tuple(score for _, score in kept))


def _as_list(value: Any, field: str) -> list[Any]:
    # A cell of a .csv has it printed.
    value = parsed(value) if isinstance(value, str) else value
    return value if isinstance(value, list) else refuse(f"field '{field}' is a {type(value).__name__}; expected a list")


def _text(answer: Any, field: str, notes: Notes) -> str:
    if isinstance(answer, Mapping) and not {"role", "from"} & answer.keys():
        name = first_of(answer, _TEXT) or refuse(f"field '{field}' has none of {', '.join(_TEXT)}")
        return _text(answer[name], f"{field}: {name}", notes)
    messages = to_messages(answer, field, notes, speaker="assistant")
    return messages[-1][1] if messages and messages[-1][0] == "assistant" else refuse(f"field '{field}' does not end with an answer")


def _score_within(answer: Mapping[str, Any]) -> float | None:
    if not is_missing(value := answer.get("fine-grained_score", answer.get("fine_grained_score"))):
        return number_of(value, "fine-grained_score")
    aspects = answer.get("annotations")
    if isinstance(aspects, Mapping):
        rated = [aspect.get("Rating") for aspect in aspects.values() if isinstance(aspect, Mapping)]
        ratings = [rating for value in rated if (rating := number_of(value, "Rating")) is not None]
        if ratings:
            return statistics.mean(ratings)
    for name in ("overall_score", "score", "rating", "reward"):
        if name in answer and (score := number_of(answer[name], name)) is not None:
            return score
    rank = number_of(answer.get("rank"), "rank")
    return None if rank is None else -rank


def by_label(row: Row) -> Scores:
    """SHP: `labels` is 1 when A is preferred; the scores are votes, and may not say otherwise."""
    votes = number_of(row.get("score_A"), "score_A"), number_of(row.get("score_B"), "score_B")
    is_first = number_of(row["labels"], "labels")
    if is_first not in (0, 1):
        refuse(f"field 'labels' is {row['labels']!r}; expected 0 or 1")
    if votes[0] is None or votes[1] is None:
        return is_first, 1 - is_first
    if (votes[0] - votes[1]) * (1 if is_first else -1) < 0:
        raise Unusable("scores contradict")
    return votes


def by_number(name: str) -> Callable[[Row], Scores]:
    """PKU-SafeRLHF: the column holds the number of the better answer, 0 or 1."""

    def scores(row: Row) -> Scores:
        better = number_of(row[name], name)
        return (1.0 - better, better) if better in (0, 1) else refuse(f"field '{name}' is {row[name]!r}; expected 0 or 1")

    return scores


def by_strength(name: str) -> Callable[[Row], Scores]:
    """HelpSteer2-preference and HelpSteer3: -3 (the first answer is much better) to 3 (the second)."""
    return lambda row: (0.0, number_of(row[name], name))


def by_scores(row: Row) -> Scores:
    """WebGPT: each answer has a score of its own."""
    return number_of(row["score_0"], "score_0"), number_of(row["score_1"], "score_1")
