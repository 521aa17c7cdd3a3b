"""Preparation: what is kept, cut, dropped and where it lands, all independent of the order of rows."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv_dpo.data.preference import Dropped, Preference
from rwkv_dpo.data.prepare import prepare, prompt_key
from rwkv_dpo.data.splits import split_rows
from rwkv_dpo.data.tokenizer import WorldTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return WorldTokenizer()


def preference(row, prompt="Why?", chosen="Because.", rejected="No."):
    return Preference(f"row {row}", "", (prompt,), chosen, rejected)


def test_pairs_decode_to_the_text_that_was_written(tokenizer):
    prepared = prepare([preference(1), preference(2, chosen="Ünï\n\n日本")], tokenizer, 64, "chat", seed=0)
    assert [[tokenizer.decode(part.tolist()) for part in prepared.pairs.pair(i)] for i in range(2)] == [
        ["User: Why?\n\nAssistant:", " Because.\n\n", " No.\n\n"],
        ["User: Why?\n\nAssistant:", " Ünï\n日本\n\n", " No.\n\n"],
    ]
    assert not prepared.pairs.is_scored
    assert prepared.pairs.header["ctx_len"] == 64
    assert prepared.pairs.header["templates"] == "chat"


def test_unusable_rows_are_named_with_their_reasons_and_counted(tokenizer):
    rows = [
        preference(1),
        preference(2, chosen=" \n"),
        preference(3, rejected=""),
        preference(4, chosen="Same", rejected=" Same\n"),
        preference(5, prompt="  "),
        preference(6, prompt="Why? "),
        preference(7, prompt="Else"),
    ]
    report = prepare(rows, tokenizer, 64, "mix", seed=0).report
    assert report.refused == [
        ("row 2", "empty answer"),
        ("row 3", "empty answer"),
        ("row 4", "identical answers"),
        ("row 5", "empty prompt"),
        ("row 6", "duplicate"),
    ]
    assert report.counts() == {
        "read": 7, "kept": 2, "cut_prompts": 0, "cut_answers": 0, "cut_tokens": 0,
        "dropped": {"empty answer": 2, "identical answers": 1, "empty prompt": 1, "duplicate": 1},
    }  # fmt: skip


def test_rows_that_were_dropped_in_reading_are_counted_with_the_others(tokenizer):
    rows = [Dropped("row 1", "tie"), preference(2), *(Dropped(f"row {i}", "malformed") for i in range(3, 10))]
    report = prepare(rows, tokenizer, 64, "mix", seed=0).report
    assert report.counts()["dropped"] == {"tie": 1, "malformed": 7}
    assert (report.n_read, report.n_kept) == (9, 1)
    assert report.dropped_rows(2) == {"tie": ["row 1"], "malformed": ["row 3", "row 4"]}


def test_a_prompt_is_dropped_only_when_no_token_of_its_last_turn_fits(tokenizer):
    n_cue = len(tokenizer.encode("\n\nAssistant:"))
    rows = [preference(1, prompt="word " * 50 + "end", chosen="other " * 50)]
    # Beside a long answer a prompt keeps half of ctx_len.
    for ctx_len, dropped in ((2 * n_cue, {"prompt does not fit": 1}), (2 * n_cue + 2, {})):
        assert prepare(rows, tokenizer, ctx_len, "chat", seed=0).report.counts()["dropped"] == dropped


def test_the_header_carries_a_users_template(tokenizer, tmp_path):
    (tmp_path / "own.txt").write_text("# {prompt}\n")
    prepared = prepare([preference(1)], tokenizer, 64, str(tmp_path / "own.txt"), seed=0)
    assert tokenizer.decode(prepared.pairs.pair(0)[0].tolist()) == "# Why?"
    assert prepared.pairs.header["templates"] == {
        "name": "own.txt", "single": {"# {prompt}": 1.0}, "system": "System", "user": "User", "assistant": "Assistant",
        "answer": " {answer}\n\n",
    }  # fmt: skip


def test_cuts_are_counted_and_answers_equal_after_the_cut_are_dropped(tokenizer):
    long = " word" * 50
    rows = [
        preference(1, prompt="a" + long),
        preference(2, chosen="b" + long, rejected="c"),
        preference(3, chosen=long + " x", rejected=long + " y"),
    ]
    prepared = prepare(rows, tokenizer, 32, "chat", seed=0)
    assert prepared.report.refused == [("row 3", "identical answers after the cut")]
    counts = prepared.report.counts()
    assert (counts["cut_prompts"], counts["cut_answers"]) == (1, 1)
    uncut = prepare(rows[:2], tokenizer, 4096, "chat", seed=0)
    assert counts["cut_tokens"] == len(uncut.pairs.tokens) - len(prepared.pairs.tokens)
    for i in range(2):
        prompt, chosen, rejected = prepared.pairs.pair(i)
        assert len(prompt) + max(len(chosen), len(rejected)) <= 32


def test_preparation_does_not_depend_on_the_order_of_rows(tokenizer):
    rows = [preference(i, prompt=f"Question {i}") for i in range(40)]
    shuffled = random.Random(0).sample(rows, len(rows))

    def lands(rows):
        prepared = prepare(rows, tokenizer, 64, "mix", seed=3)
        splits = split_rows(prepared.prompt_keys, 0.2, 0.2, seed=3)
        return {
            name: sorted(tuple(prepared.pairs.pair(i)[0].tolist()) for i in rows_of_split) for name, rows_of_split in splits.items()
        }

    assert lands(rows) == lands(shuffled)


def test_a_row_is_cut_for_its_own_answers_whatever_stands_beside_it(tokenizer):
    """A row that is refused too: a long answer of it took the prompt of its neighbour."""
    row = Preference("row 1", "", ("word " * 40,), "Yes.", "No.")
    others = [Preference("row 2", "", row.turns, "", "a long answer " * 9), Preference("row 3", "", row.turns, "b " * 20, "c " * 20)]
    alone = prepare([row], tokenizer, 40, "chat", seed=0).pairs
    for rows in ([row, *others], [*others, row], [others[0], row]):
        pairs = prepare(rows, tokenizer, 40, "chat", seed=0).pairs
        assert [part.tolist() for part in alone.pair(0)] in [[part.tolist() for part in pairs.pair(i)] for i in range(len(pairs))]


@pytest.mark.parametrize("answers", [("yes", "yes"), ("yes", "sure")])
def test_prompts_that_the_cut_makes_the_same_land_in_one_split_whatever_their_order(tokenizer, answers):
    rows = [preference(2 * i + j, "ab"[j] + f" word{i}" * 60, answers[j]) for i in range(30) for j in (0, 1)]
    # Differs from the first in case alone, so that its own tokens belong to the same prompt.
    rows += [preference(100, "A" + " WORD0" * 60, "yes")]

    def lands(rows):
        prepared = prepare(rows, tokenizer, 32, "chat", seed=0)
        splits = split_rows(prepared.prompt_keys, 0.3, 0.3, seed=0)
        return {name: {prepared.pairs.pair(row)[0].tobytes() for row in part} for name, part in splits.items()}

    prompts = lands(rows)
    assert all(prompts.values())
    assert sum(map(len, prompts.values())) == len(set().union(*prompts.values()))
    assert prompts == lands(rows[::-1]) == lands(random.Random(1).sample(rows, len(rows)))


def test_splits_hold_every_row_once_at_about_their_ratios():
    keys = [f"prompt {i}" for i in range(5000)]
    splits = split_rows(keys, valid_ratio=0.1, test_ratio=0.2, seed=0)
    assert sorted(row for rows in splits.values() for row in rows) == list(range(5000))
    for name, ratio in (("train", 0.7), ("valid", 0.1), ("test", 0.2)):
        # Five standard deviations of a binomial count.
        assert abs(len(splits[name]) - 5000 * ratio) < 5 * (5000 * ratio * (1 - ratio)) ** 0.5
    assert splits != split_rows(keys, 0.1, 0.2, seed=1)


def test_ratios_of_zero_leave_splits_empty():
    assert split_rows(["a", "b"], 0.0, 0.0, seed=0) == {"train": [0, 1], "valid": [], "test": []}


@given(st.lists(st.text(alphabet="aB \n", min_size=1), min_size=1), st.integers(0, 9))
def test_no_prompt_is_in_two_splits(prompts, seed):
    keys = [prompt_key(preference(1, prompt=prompt)) for prompt in prompts]
    splits = split_rows(keys, 0.3, 0.3, seed)
    # Spacing within a word does make another prompt ("a b" is not "ab"); case and outer or repeated spacing do not.
    for prompt, key in zip(prompts, keys, strict=True):
        same = [row for row, other in enumerate(prompts) if other.lower().split() == prompt.lower().split()]
        assert len({name for name, rows in splits.items() for row in same if row in rows}) == 1
        assert key == " ".join(prompt.lower().split())


@settings(max_examples=60)
@given(st.lists(st.tuples(*[st.text(max_size=30)] * 3), max_size=6), st.integers(2, 40))
def test_odd_texts_are_kept_within_bounds_or_refused(tokenizer, rows, ctx_len):
    prepared = prepare([preference(i, *row) for i, row in enumerate(rows)], tokenizer, ctx_len, "mix", seed=0)
    report = prepared.report
    assert report.n_read == len(rows) == report.n_kept + len(report.refused)
    assert len(prepared.pairs) == len(prepared.prompt_keys) == report.n_kept
    for i in range(len(prepared.pairs)):
        prompt, chosen, rejected = prepared.pairs.pair(i)
        assert min(map(len, (prompt, chosen, rejected))) >= 1
        assert len(prompt) + max(len(chosen), len(rejected)) <= ctx_len
        assert chosen.tolist() != rejected.tolist()
