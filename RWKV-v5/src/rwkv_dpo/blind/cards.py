"""Questions with the answers of two models to each, and which answer stands on which side; in a file, in the order of asking."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_dpo.base.errors import InputError, reading, refuse
from rwkv_dpo.data.prompt_files import PromptRow, is_text, read_prompts
from rwkv_dpo.data.prompts import seeded_fraction
from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.files.json_text import as_json

FILE = "answers.jsonl"
OWN_QUESTIONS = Path(__file__).with_name("questions.jsonl")


class Question(NamedTuple):
    """`kind` and `language`: what results are told apart by, "" where a list doesn't say."""

    prompt: str
    kind: str = ""
    language: str = ""


class Card(NamedTuple):
    """`answers`: of the first and the second model; `sides`: the model (0 or 1) at A, and the one at B."""

    question: Question
    answers: tuple[str, str]
    sides: tuple[int, int]

    @property
    def is_asked(self) -> bool:
        """Between answers that are the same there is nothing to choose."""
        return self.answers[0] != self.answers[1]

    def side(self, letter: str) -> str:
        """The answer at A or B."""
        return self.answers[self.sides["AB".index(letter)]]


def read_questions(path: Path | None) -> list[Question]:
    """Those of a file of prompts (InputError when it is none), or our own; each once."""
    found: dict[str, Question] = {}
    for row in read_prompts("--questions", path or OWN_QUESTIONS):
        found.setdefault(row.prompt, _question(row))
    return list(found.values())


def read_answers(paths: Sequence[Path]) -> tuple[list[Question], list[list[str]]]:
    """What two files of chat.py --out hold: the questions, in the order of the first file, and the first answer to each in either file.
    InputError, naming file and line, where a prompt stands in one of them alone, or twice, or without an answer."""
    rows = [_by_prompt(read_prompts("--answers", path, is_json=True)) for path in paths]
    for here, there, other in ((rows[0], rows[1], paths[1]), (rows[1], rows[0], paths[0])):
        for prompt, row in here.items():
            if prompt not in there:
                refuse(f"{row.where}: {other} has no such prompt: {prompt[:60]!r}")
    return [_question(row) for row in rows[0].values()], [[_first_answer(found[prompt]) for prompt in rows[0]] for found in rows]


def deal(questions: Sequence[Question], answers: Sequence[Sequence[str]], seed: int) -> list[Card]:
    """The cards in a drawn order, with drawn sides. A draw depends on the seed and the prompt alone. answers: of the first model to all
    questions, and of the second."""
    cards = []
    for question, first, second in zip(questions, *answers, strict=True):
        is_swapped = seeded_fraction("blind side", seed, question.prompt) < 0.5
        cards.append(Card(question, (first, second), (1, 0) if is_swapped else (0, 1)))
    return sorted(cards, key=lambda card: seeded_fraction("blind order", seed, card.question.prompt))


def write_cards(folder: Path, cards: Sequence[Card]) -> None:
    """Into FILE, atomically."""
    with atomic_write(folder / FILE) as file:
        for card in cards:
            row = {**card.question._asdict(), "answers": card.answers, "sides": card.sides}
            file.write(as_json(row, ensure_ascii=False).encode() + b"\n")


def read_cards(folder: Path) -> list[Card]:
    """Those of write_cards; none where there is no FILE yet. InputError for a file that isn't its."""
    path = folder / FILE
    if not path.exists():
        return []
    with reading(path):
        lines = path.read_bytes().split(b"\n")[:-1]
    return [_card(f"{path}: line {number}", line) for number, line in enumerate(lines, start=1)]


def _card(where: str, line: bytes) -> Card:
    try:
        row = json.loads(line)
        card = Card(Question(row["prompt"], row["kind"], row["language"]), tuple(row["answers"]), tuple(row["sides"]))
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise InputError(f"{where}: no question with two answers, as blindtest.py writes them ({error})") from error
    if not all(map(is_text, (*card.question, *card.answers))) or len(card.answers) != 2 or card.sides not in ((0, 1), (1, 0)):
        refuse(f"{where}: no question with two answers, as blindtest.py writes them")
    return card


def _question(row: PromptRow) -> Question:
    said = {name: value for name in ("kind", "language") if is_text(value := row.fields.get(name))}
    return Question(row.prompt, **said)


def _by_prompt(rows: Sequence[PromptRow]) -> dict[str, PromptRow]:
    found: dict[str, PromptRow] = {}
    for row in rows:
        if row.prompt in found:
            refuse(f"{row.where}: the prompt stands there a second time: {row.prompt[:60]!r}")
        found[row.prompt] = row
    return found


def _first_answer(row: PromptRow) -> str:
    answers: Any = row.fields.get("answers")
    if not (isinstance(answers, list) and answers and is_text(answers[0])):
        refuse(f"{row.where}: has no text in a list 'answers'")
    return answers[0].strip()
