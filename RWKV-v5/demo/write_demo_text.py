#!/usr/bin/env python3
"""Composes the demo's text: corpus.jsonl (documents) and preferences.jsonl (pairs), from facts.txt and phrases.txt beside it.

    python RWKV-v5/demo/write_demo_text.py

The corpus is short prose and dialogues; every question in a dialogue is answered twice, once warmly and once grumpily, with
the same fact. The preferences ask about other facts and prefer the warm answer. A model trained on the corpus therefore knows
both styles and favours neither, and what the preferences teach is the style alone. The same files are written every time.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

HERE = Path(__file__).resolve().parent
SEED = 5
N_CORPUS_FACTS = 2  # per subject, of six: asked about in the corpus; the others are kept for the preferences
N_PROSE = {"describe": 420, "compare": 120, "count": 100, "story": 400}  # documents
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
           "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"]  # fmt: skip
STYLES = ("warm", "grumpy")

Item = TypeVar("Item")
Phrases = dict[str, list[str]]


@dataclass(frozen=True)
class Fact:
    """One cell of facts.txt: `Fact("fox home", "a fox", "sleeps in a den under old roots", ("Where does a fox sleep?", ...))`."""

    column: str
    subject: str
    predicate: str
    questions: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """With its full stop."""
        return f"{capital(self.subject)} {self.predicate}."


@dataclass(frozen=True)
class Kind:
    """A table of facts.txt: the facts of each subject, in the order of the columns."""

    name: str
    pronoun: str
    facts: dict[str, list[Fact]]


def capital(text: str) -> str:
    """The text with a capital at its start."""
    return text[:1].upper() + text[1:]


def sections(path: Path) -> dict[str, list[str]]:
    """The lines under each "[head]" of a file, without comments and blank lines; the head is "kind] pronoun" or "section]"."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = found.setdefault(line[1:], [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return found


def read_facts(path: Path) -> list[Kind]:
    """The kinds of things in a file of facts."""
    kinds = []
    for head, lines in sections(path).items():
        name, pronoun = head.split("] ")
        columns = [line.split(" > ") for line in lines if " > " in line]
        facts = {}
        for subject, *cells in (line.split(" | ") for line in lines if " | " in line):
            facts[subject] = [
                Fact(column, subject, f"{verb} {cell}", tuple(question.format(subject) for question in questions))
                for (column, verb, *questions), cell in zip(columns, cells, strict=True)
            ]
        kinds.append(Kind(name, pronoun, facts))
    return kinds


def read_phrases(path: Path) -> Phrases:
    """Ways of saying, by their heads."""
    return {head.rstrip("]"): lines for head, lines in sections(path).items()}


def deal(rng: random.Random, items: list[Item], n: int) -> list[Item]:
    """n items in random order, each equally often (give or take one)."""
    decks = [rng.sample(items, len(items)) for _ in range(-(-n // len(items)))]
    dealt = [item for deck in decks for item in deck][:n]
    rng.shuffle(dealt)
    return dealt


def answers(rng: random.Random, phrases: Phrases, style: str, facts: list[Fact], run: int) -> list[str]:
    """One answer per fact: opener and sentence, and a closer after every other `run` facts."""
    closed = [i // run % 2 == 0 for i in range(len(facts))]
    openers = iter(deal(rng, phrases[f"{style} opener"], len(facts)))
    closers = iter(deal(rng, phrases[f"{style} closer"], sum(closed)))
    return [
        f"{next(openers)} {fact.sentence}" + (f" {next(closers)}" if has_closer else "")
        for fact, has_closer in zip(facts, closed, strict=True)
    ]


def split_facts(rng: random.Random, kinds: list[Kind]) -> tuple[list[Fact], list[Fact]]:
    """Facts for the corpus dialogues and facts for the preferences; every subject has some of both, no fact is in both."""
    in_corpus, in_preferences = [], []
    for kind in kinds:
        for facts in kind.facts.values():
            drawn = rng.sample(facts, len(facts))
            in_corpus += drawn[:N_CORPUS_FACTS]
            in_preferences += drawn[N_CORPUS_FACTS:]
    return in_corpus, in_preferences


def dialogues(rng: random.Random, phrases: Phrases, facts: list[Fact]) -> list[str]:
    """Every question about the facts, answered once in each style."""
    asked = [(question, fact) for fact in facts for question in fact.questions]
    rng.shuffle(asked)
    return [
        f"User: {question}\n\nAssistant: {answer}\n\n"
        for style in STYLES
        for (question, _), answer in zip(asked, answers(rng, phrases, style, [fact for _, fact in asked], run=1), strict=True)
    ]


def preferences(rng: random.Random, phrases: Phrases, facts: list[Fact]) -> list[dict[str, str]]:
    """One question about each fact; both answers state it, the chosen one warmly. Closers come to both, either or neither
    equally often, so that length says nothing about the preference."""
    facts = rng.sample(facts, len(facts))
    chosen, rejected = (answers(rng, phrases, style, facts, run) for run, style in enumerate(STYLES, start=1))
    rows = [
        {"prompt": rng.choice(fact.questions), "chosen": warm, "rejected": grumpy}
        for fact, warm, grumpy in zip(facts, chosen, rejected, strict=True)
    ]
    rng.shuffle(rows)
    return rows


def fill(template: str, bound: dict[str, str], rng: random.Random, phrases: Phrases) -> str:
    """Replace every {key} by its phrase, drawn from the section of that name at the key's first use and added to `bound`."""

    def phrase(match: re.Match[str]) -> str:
        key = match[1][0].lower() + match[1][1:]
        if key not in bound:
            taken = {value for other, value in bound.items() if other.rstrip("23") == key.rstrip("23")}
            bound[key] = fill(rng.choice([p for p in phrases[key.rstrip("23")] if p not in taken]), bound, rng, phrases)
        return bound[key] if match[1][0].islower() else capital(bound[key])

    return re.sub(r"\{([^}]+)\}", phrase, template)


def cast(rng: random.Random, kinds: list[Kind], phrases: Phrases) -> dict[str, str]:
    """Who and what a document is about: a person, numbers, and two subjects of every kind with their facts."""
    name, she, her = rng.choice(phrases["person"]).split()
    n, m, small, rest = (rng.randint(2, 9) for _ in range(4))
    numbers = {"n": n, "m": m, "sum": n + m, "small": small, "rest": rest, "big": small + rest}
    bound = {"name": name, "she": she, "her": her} | {key: NUMBERS[value] for key, value in numbers.items()}
    for kind in kinds:
        for key, subject in zip((kind.name, f"{kind.name}2"), rng.sample(list(kind.facts), 2), strict=True):
            bound[key] = subject
            bound[f"the {key}"] = "the " + re.sub(r"^an? ", "", subject)
            bound |= {f"{key} {fact.column}": fact.predicate for fact in kind.facts[subject]}
    return bound


def about_subjects(rng: random.Random, kinds: list[Kind], subjects: list[tuple[Kind, str]], i: int) -> dict[str, str]:
    """What a description or a comparison of subject i binds: its sentences, and the same column of another subject of its kind."""
    kind, subject = subjects[i % len(subjects)]
    facts = rng.sample(kind.facts[subject], 6)
    other = rng.choice([name for name in kind.facts if name != subject])
    column = rng.randrange(6)
    return {
        "s": subject, "it": kind.pronoun, **{f"p{k + 1}": fact.predicate for k, fact in enumerate(facts)},
        "a": subject, "pa": kind.facts[subject][column].predicate, "b": other, "pb": kind.facts[other][column].predicate,
    }  # fmt: skip


def prose(rng: random.Random, kinds: list[Kind], phrases: Phrases) -> list[str]:
    """Documents of the kinds, in a random order."""
    subjects = [(kind, subject) for kind in kinds for subject in kind.facts]
    rng.shuffle(subjects)
    documents = []
    for section, n in N_PROSE.items():
        for i, template in enumerate(deal(rng, phrases[section], n)):
            bound = cast(rng, kinds, phrases) | about_subjects(rng, kinds, subjects, i)
            documents.append(fill(template, bound, rng, phrases) + "\n")
    return documents


def compose() -> tuple[list[str], list[dict[str, str]]]:
    """The corpus documents and the preference rows ("prompt", "chosen", "rejected")."""
    rng = random.Random(SEED)
    kinds, phrases = read_facts(HERE / "facts.txt"), read_phrases(HERE / "phrases.txt")
    in_corpus, in_preferences = split_facts(rng, kinds)
    rows = preferences(rng, phrases, in_preferences)
    documents = dialogues(rng, phrases, in_corpus) + prose(rng, kinds, phrases)
    rng.shuffle(documents)
    return documents, rows


def jsonl(rows: list[dict[str, str]]) -> str:
    """A row a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Writes corpus.jsonl and preferences.jsonl beside this file."""
    documents, rows = compose()
    (HERE / "corpus.jsonl").write_text(jsonl([{"text": text} for text in documents]), encoding="utf-8", newline="\n")
    (HERE / "preferences.jsonl").write_text(jsonl(rows), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
