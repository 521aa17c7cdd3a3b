"""The demo's text teaches both styles equally and prefers one: what the demo's "about chance before, above 0.9 after" rests on."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pyrwkv_tokenizer import RWKVTokenizer

DEMO = Path(__file__).resolve().parents[1] / "RWKV-v5" / "demo"
ENCODE = RWKVTokenizer().encode
STYLES = ("warm", "grumpy")


def read_jsonl(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


DOCUMENTS = [row["text"] for row in read_jsonl("corpus.jsonl")]
DIALOGUES = [text for text in DOCUMENTS if text.startswith("User: ")]
PROSE = [text for text in DOCUMENTS if not text.startswith("User: ")]
ROWS = read_jsonl("preferences.jsonl")


def phrases(section: str) -> list[str]:
    text = (DEMO / "phrases.txt").read_text(encoding="utf-8")
    return re.search(rf"^\[{section}\]\n(.*?)\n\n", text, re.M | re.S)[1].splitlines()


OPENERS = {style: phrases(f"{style} opener") for style in STYLES}
CLOSERS = {style: phrases(f"{style} closer") for style in STYLES}


def parts(answer: str) -> tuple[str, str, str, str]:
    """Style, opener, fact and closer ("" for none) of an answer."""
    [(style, opener)] = [(s, o) for s in STYLES for o in OPENERS[s] if answer.startswith(o + " ")]
    fact = answer[len(opener) + 1 :]
    closer = next((c for c in CLOSERS[style] if fact.endswith(" " + c)), "")
    return style, opener, fact.removesuffix(" " + closer) if closer else fact, closer


def questions_and_answers() -> list[tuple[str, str]]:
    return [re.fullmatch(r"User: (.+)\n\nAssistant: (.+)\n\n", text).groups() for text in DIALOGUES]


def trigram(streams: list[list[int]]):
    """log p(token | two before it), interpolated with bigram, unigram and a uniform floor (Jelinek-Mercer)."""
    counts = [Counter[tuple[int, ...]]() for _ in range(3)]
    for ids in streams:
        for n, counter in enumerate(counts, start=1):
            counter.update(zip(*(ids[i:] for i in range(n)), strict=False))
    n_tokens = counts[0].total()

    def log_prob(ids: list[int], i: int) -> float:
        p = (counts[0][ids[i],] + 0.1) / (n_tokens + 0.1 * 65536)
        for n in (1, 2):
            seen = counts[n - 1][tuple(ids[i - n : i])]
            if seen:
                p = 0.2 * p + 0.8 * counts[n][tuple(ids[i - n : i + 1])] / seen
        return math.log(p)

    return log_prob


def test_the_committed_files_are_what_the_script_writes(tmp_path):
    for name in ("write_demo_text.py", "facts.txt", "phrases.txt"):
        shutil.copy(DEMO / name, tmp_path)
    subprocess.run([sys.executable, tmp_path / "write_demo_text.py"], check=True, cwd="/")
    for name in ("corpus.jsonl", "preferences.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), f"{name} is stale: run write_demo_text.py"


def test_corpus_is_small_and_mostly_prose():
    n_prose, n_dialogue = (sum(len(ENCODE(text)) for text in texts) for texts in (PROSE, DIALOGUES))
    assert 60_000 <= n_prose + n_dialogue <= 120_000
    assert n_prose >= n_dialogue
    assert (DEMO / "corpus.jsonl").stat().st_size <= 400_000
    assert len(set(DOCUMENTS)) > 0.99 * len(DOCUMENTS)


def test_every_placeholder_is_filled_and_text_is_plain_ascii():
    for text in DOCUMENTS + [value for row in ROWS for value in row.values()]:
        assert text.isascii()
        assert not re.search(r"[{}|>]|  |\.\.|\ba [aeio]|\ban [^aeioh]|,\.", text), text


@pytest.mark.parametrize("table", [OPENERS, CLOSERS], ids=["openers", "closers"])
def test_styles_have_equally_many_phrases_of_equal_length_and_distinct_first_tokens(table):
    ids = {style: [ENCODE(" " + phrase) for phrase in table[style]] for style in STYLES}
    assert len(ids["warm"]) == len(ids["grumpy"]) >= 12
    assert {len(i) for style in STYLES for i in ids[style]} == {6}
    assert len({i[0] for style in STYLES for i in ids[style]}) == 2 * len(ids["warm"])


def test_every_corpus_question_is_answered_once_in_each_style_with_the_same_fact():
    told: dict[str, list[tuple[str, str]]] = {}
    for question, answer in questions_and_answers():
        style, _, fact, _ = parts(answer)
        told.setdefault(question, []).append((style, fact))
    for question, answers in told.items():
        (style1, fact1), (style2, fact2) = answers
        assert {style1, style2} == set(STYLES), question
        assert fact1 == fact2, question


@pytest.mark.parametrize(
    "answers",
    [[a for _, a in questions_and_answers()], [row[k] for row in ROWS for k in ("chosen", "rejected")]],
    ids=["corpus", "pairs"],
)
def test_every_opener_and_closer_is_used_equally_often(answers):
    styles, openers, _, closers = zip(*map(parts, answers), strict=True)
    assert Counter(styles)["warm"] == Counter(styles)["grumpy"]
    assert len(set(Counter(openers).values())) == 1
    assert len(set(Counter(closer for closer in closers if closer).values())) == 1
    assert len(set(openers)) == 48
    assert sum(map(bool, closers)) == len(answers) / 2


def test_a_preference_is_warm_over_grumpy_about_the_same_fact_and_length_does_not_tell():
    lengths = []
    for row in ROWS:
        (chosen_style, _, chosen_fact, _), (rejected_style, _, rejected_fact, _) = parts(row["chosen"]), parts(row["rejected"])
        assert (chosen_style, rejected_style) == STYLES
        assert chosen_fact == rejected_fact
        lengths.append([len(ENCODE(f" {row[key]}\n\n")) for key in ("chosen", "rejected")])
    assert all(10 <= n <= 30 for pair in lengths for n in pair)
    signs = Counter((chosen > rejected) - (chosen < rejected) for chosen, rejected in lengths)
    assert signs == {1: len(ROWS) / 4, -1: len(ROWS) / 4, 0: len(ROWS) / 2}


def test_preference_prompts_are_distinct_and_their_facts_are_in_no_corpus_dialogue():
    corpus = questions_and_answers()
    prompts = [row["prompt"] for row in ROWS]
    assert 400 <= len(set(prompts)) == len(prompts) <= 600
    assert not set(prompts) & {question for question, _ in corpus}
    assert not {parts(row["chosen"])[2] for row in ROWS} & {parts(answer)[2] for _, answer in corpus}
    whole = "\n".join(DOCUMENTS)
    assert not any(row[key] in whole for row in ROWS for key in ("chosen", "rejected"))


def test_a_trigram_model_of_the_corpus_is_at_chance_on_the_preferences():
    log_prob = trigram([[*ENCODE(text), 0] for text in DOCUMENTS])

    def score(prompt: str, answer: str) -> float:
        head = ENCODE(f"User: {prompt}\n\nAssistant:")
        ids = head + ENCODE(f" {answer}\n\n")
        return sum(log_prob(ids, i) for i in range(len(head), len(ids)))

    accuracy = sum(score(row["prompt"], row["chosen"]) > score(row["prompt"], row["rejected"]) for row in ROWS) / len(ROWS)
    # Chance is 0.5 with a standard error of 0.023 over 480 rows; the rest of the band is the openers' own wording.
    assert 0.4 < accuracy < 0.6
