"""What is told of votes, against sums of binomial terms and the code that reads preferences."""

import math

import pytest
from rwkv_dpo.blind.cards import Card, Question
from rwkv_dpo.blind.result import as_text, count, pairs_of, result_of, shown, sign_test
from rwkv_dpo.data.prepare import prepare
from rwkv_dpo.data.sources import read_preferences
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.files.json_text import as_json

NAMES = ["base.pth", "tuned.pth"]


def card(i, sides, kind="facts", language="en"):
    return Card(Question(f"Question {i}?", kind, language), (f"first {i}", f"second {i}"), sides)


CARDS = [card(1, (0, 1)), card(2, (1, 0)), card(3, (1, 0), "chat"), card(4, (0, 1), "chat", "zh"), card(5, (0, 1), "chat")]
# Second, second, equal, first.
CHOICES = {1: "B", 2: "A", 3: "=", 4: "A"}


def tail(n, k, p):
    """The probability of k or more of n."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


def test_votes_count_for_the_model_behind_the_side():
    assert count(CARDS, CHOICES) == {"wins": [1, 2], "ties": 1}
    assert count(CARDS, {}) == {"wins": [0, 0], "ties": 0}


@pytest.mark.parametrize("wins", [(1, 2), (0, 6), (6, 0), (5, 5), (12, 31), (40, 27), (1, 0)])
def test_the_sign_test_is_the_sum_of_both_tails_and_the_interval_has_2_5_percent_beyond_each_end(wins):
    n, k = sum(wins), wins[1]
    test = sign_test(wins)
    assert test["win_rate"] == k / n
    assert test["p"] == pytest.approx(min(1.0, 2 * tail(n, max(k, n - k), 0.5)))
    low, high = test["interval"]
    assert tail(n, k, low) == pytest.approx(0.025, rel=1e-6) if k else low == 0
    assert 1 - tail(n, k + 1, high) == pytest.approx(0.025, rel=1e-6) if k < n else high == 1
    assert (test["p"] < 0.05) == (not low <= 0.5 <= high)


def test_without_decided_votes_nothing_is_claimed():
    assert sign_test((0, 0)) == {"win_rate": None, "interval": [0.0, 1.0], "p": 1.0}
    assert "too even to say which is better" in as_text(result_of(NAMES, CARDS, {3: "="}))


def test_the_result_in_numbers_and_words():
    same = card(6, (0, 1))._replace(answers=("same", "same"))
    pairs = [{"logps/accuracies": 0.5, "logps/chosen": -3.0, "logps/rejected": -4.5}] * 2
    result = result_of(NAMES, [*CARDS, same], CHOICES, pairs)
    assert {name: result[name] for name in ("models", "questions", "judged", "same_answers", "wins", "ties")} == {
        "models": NAMES, "questions": 5, "judged": 4, "same_answers": 1, "wins": [1, 2], "ties": 1
    }  # fmt: skip
    assert result["by_kind"] == {"chat": {"wins": [1, 0], "ties": 1}, "facts": {"wins": [0, 2], "ties": 0}}
    assert result["by_language"] == {"en": {"wins": [0, 2], "ties": 1}, "zh": {"wins": [1, 0], "ties": 0}}
    assert shown(result)["rows"] == [
        ["judged better", "1", "2"], ["win rate, ties aside", "33.3 %", "66.7 %"], ["95 % interval", "0.8 to 90.6 %", "9.4 to 99.2 %"],
        ["better: chat, 1 equal", "1", "0"], ["better: facts", "0", "2"], ["better: en, 1 equal", "0", "2"], ["better: zh", "1", "0"],
        ["held-out preference accuracy", "0.500", "0.500"], ["held-out margin (nats)", "+1.50", "+1.50"],
    ]  # fmt: skip
    assert as_text(result).splitlines()[-3:] == [
        "4 of 5 questions judged, 1 of them equal.", "1 more had the same answer from both and was not asked.",
        "The votes are too even to say which is better (sign test, exact, two-sided: p = 1).",
    ]  # fmt: skip


@pytest.mark.parametrize(("wins", "better"), [((0, 9), "tuned.pth"), ((9, 0), "base.pth")])
def test_the_better_one_is_named(wins, better):
    cards = [card(i, (0, 1)) for i in range(9)]
    choices = dict.fromkeys(range(1, 10), "B" if wins[1] else "A")
    assert shown(result_of(NAMES, cards, choices))["lines"][-1] == f"{better} is judged better (sign test, exact, two-sided: p = 0.0039)."


def test_questions_without_a_kind_have_no_rows_of_kinds():
    cards = [one._replace(question=Question(one.question.prompt)) for one in CARDS]
    assert not {"by_kind", "by_language", "held_out"} & set(result_of(NAMES, cards, CHOICES))


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_votes_are_preferences_that_preparation_reads(tmp_path, system):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(as_json(row) + "\n" for row in pairs_of(CARDS, CHOICES, system)))
    read = [(one.system, one.turns, one.chosen, one.rejected) for one in read_preferences(path)]
    assert read == [
        (system, ("Question 1?",), "second 1", "first 1"), (system, ("Question 2?",), "second 2", "first 2"),
        (system, ("Question 4?",), "first 4", "second 4"),
    ]  # fmt: skip
    tokenizer = WorldTokenizer()
    prepared = prepare(read_preferences(path), tokenizer, 100, "chat", 0)
    assert prepared.report.counts()["kept"] == 3
    assert [[tokenizer.decode(part).strip() for part in prepared.pairs.pair(i)[1:]] for i in range(3)] == [list(one[2:]) for one in read]
