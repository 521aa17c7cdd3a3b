"""Which pairs are made of rankings, and what becomes of answers that stand in a row each."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.preference import Dropped, Notes, Preference, Ranking
from rwkv_dpo.data.rankings import UNUSED, Pairing, paired, pairs_of
from rwkv_dpo.data.sources import read_preferences

WAYS = ["best_worst", "best_rest", "adjacent", "all", "random:2"]


def ranking(where, scores, prompt="p", is_part=False):
    return Ranking(where, "", (prompt,), tuple(f"{where} a{i}" for i in range(len(scores))), tuple(map(float, scores)), is_part)


def made(rows, pairing=Pairing(), notes=None):  # noqa: B008 (frozen)
    return list(paired(rows, pairing, notes or Notes()))


@pytest.mark.parametrize(("way", "scores", "expected"), [
    ("best_worst", [2, 7, 5], [(1, 0)]),
    ("best_rest", [2, 7, 5], [(1, 2), (1, 0)]),
    ("adjacent", [2, 7, 5], [(1, 2), (2, 0)]),
    ("all", [2, 7, 5], [(1, 2), (1, 0), (2, 0)]),
    ("best_worst", [3, 3, 1, 1], [(0, 2)]),
    ("best_rest", [3, 3, 1], [(0, 2)]),
    ("adjacent", [3, 3, 1, 0], [(0, 2), (1, 2), (2, 3)]),
    ("all", [3, 3, 1], [(0, 2), (1, 2)]),
    ("all", [3, 3], []),
    ("all", [3], []),
    ("random:9", [2, 7, 5], [(1, 2), (1, 0), (2, 0)]),
])  # fmt: skip
def test_pairs_are_made_by_the_way_that_is_named(way, scores, expected):
    assert pairs_of(scores, Pairing(way)) == expected


@given(st.lists(st.integers(0, 4) | st.floats(-5, 5), max_size=8), st.sampled_from(WAYS), st.sampled_from([0, 0.5, 2.0]), st.integers())
def test_a_better_answer_is_never_worse_or_too_near_by_its_score(scores, way, min_gap, seed):
    pairs = pairs_of(scores, Pairing(way, min_gap, seed), "prompt")
    every = pairs_of(scores, Pairing("all", min_gap))
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) <= set(every)
    assert all(scores[i] > scores[j] and scores[i] - scores[j] >= min_gap for i, j in pairs)
    # Of neighbours all may be too near each other.
    assert bool(pairs) == bool(every) or (way == "adjacent" and min_gap)
    if way == "random:2":
        assert len(pairs) == min(2, len(every))
    if len({float(score) for score in scores}) == len(scores) > 1 and not min_gap:
        n = len(scores)
        assert len(pairs) == {"best_worst": 1, "best_rest": n - 1, "adjacent": n - 1, "all": n * (n - 1) // 2}.get(way, len(pairs))


def test_random_pairs_depend_on_the_seed_and_the_prompt_alone():
    scores = range(8)
    drawn = [pairs_of(scores, Pairing("random:3", seed=seed), prompt) for seed in range(5) for prompt in ("a", "b")]
    assert drawn == [pairs_of(scores, Pairing("random:3", seed=seed), prompt) for seed in range(5) for prompt in ("a", "b")]
    assert len(set(map(tuple, drawn))) > 5


@pytest.mark.parametrize(("rank_pairs", "min_gap", "fault"), [
    ("best", 0, r"--rank_pairs best: accepted are best_worst, best_rest, adjacent, all, and random:N"),
    ("random", 0, "--rank_pairs random: "), ("random:0", 0, "--rank_pairs random:0: "), ("random:x", 0, "--rank_pairs random:x: "),
    ("all", -1, "--min_gap -1: at least 0 is accepted"), ("all", float("nan"), "--min_gap nan"),
])  # fmt: skip
def test_bad_ways_are_refused(rank_pairs, min_gap, fault):
    with pytest.raises(InputError, match=fault):
        Pairing(rank_pairs, min_gap)


def test_pairs_of_rankings_are_named_by_row_and_answer_and_unused_answers_counted():
    notes = Notes()
    two, four = ranking("row 1", [1, 2]), ranking("row 2", [4, 1, 3, 2])
    told = made([two, four], notes=notes)
    assert told == [
        Preference("row 1", "", ("p",), "row 1 a1", "row 1 a0"),
        Preference("row 2, answer 1 over row 2, answer 2", "", ("p",), "row 2 a0", "row 2 a1"),
    ]
    assert [preference.gap for preference in told] == [1, 3]
    assert notes.counts == {"rankings of 2 answers": 1, "rankings of 4 answers": 1, UNUSED: 2}


def test_rankings_without_a_pair_are_dropped_by_reason():
    rows = [ranking("row 1", [1]), ranking("row 2", [1, 1]), ranking("row 3", [1, 1.5])]
    assert made(rows, Pairing(min_gap=1)) == [
        Dropped("row 1", "a ranking with one answer"), Dropped("row 2", "tie"), Dropped("row 3", "gap below --min_gap")
    ]  # fmt: skip


def test_a_pair_with_scores_of_its_own_heeds_min_gap_and_one_without_does_not():
    pairs = [Preference(f"row {i}", "", ("p",), "c", "r", scores) for i, scores in enumerate(((1.5, 1.0), (3.0, 1.0), None))]
    assert made(pairs, Pairing(min_gap=1)) == [Dropped("row 0", "gap below --min_gap"), *pairs[1:]]


def test_answers_in_a_row_each_are_gathered_by_prompt_in_the_order_of_their_first_rows():
    rows = [
        ranking("row 1", [1], "x", True), ranking("row 2", [0], "y", True), Preference("row 3", "", ("z",), "c", "r"),
        ranking("row 4", [1], "y", True), ranking("row 5", [0], "x", True), ranking("row 6", [1], "alone", True),
        ranking("row 7", [1], "same", True), ranking("row 8", [1], "same", True),
    ]  # fmt: skip
    assert made(rows) == [
        Preference("row 3", "", ("z",), "c", "r"),
        Preference("row 1 over row 5", "", ("x",), "row 1 a0", "row 5 a0"),
        Preference("row 4 over row 2", "", ("y",), "row 4 a0", "row 2 a0"),
        Dropped("row 6", "unpaired"), Dropped("row 7", "unpaired"), Dropped("row 8", "unpaired"),
    ]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=12))
def test_every_thumb_is_in_a_pair_or_counted(thumbs):
    rows = [ranking(f"row {i}", [is_good], prompt, True) for i, (prompt, is_good) in enumerate(thumbs)]
    told = made(rows, Pairing("all"))
    dropped = {one.where for one in told if isinstance(one, Dropped)}
    used = {answer for one in told if isinstance(one, Preference) for answer in (one.chosen, one.rejected)}
    for row, (prompt, is_good) in zip(rows, thumbs, strict=True):
        has_other = (prompt, not is_good) in thumbs
        assert (row.where in dropped, row.answers[0] in used) == (not has_other, has_other)
    good = {row.answers[0]: is_good for row, (_, is_good) in zip(rows, thumbs, strict=True)}
    assert all(good[one.chosen] and not good[one.rejected] for one in told if isinstance(one, Preference))


def test_a_file_of_one_answer_a_row_ends_in_pairs(tmp_path):
    rows = [{"prompt": p, "response": f"{p}{h}", "helpfulness": h, "correctness": 1} for p in "ab" for h in (1, 4, 2)]
    rows.append({"prompt": "c", "response": "c", "helpfulness": 3, "correctness": 1})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    notes = Notes()
    told = list(read_preferences(tmp_path / "a.jsonl", pairing=Pairing("best_rest"), notes=notes))
    assert [(one.chosen, one.rejected) for one in told[:-1]] == [("a4", "a2"), ("a4", "a1"), ("b4", "b2"), ("b4", "b1")]
    assert told[-1] == Dropped("line 7", "unpaired")
    assert (notes.n_rows, notes.first_row) == (7, '{prompt: "a", response: "a1", helpfulness: 1, correctness: 1}')
    # A limit is of rows, whatever they hold.
    assert len(list(read_preferences(tmp_path / "a.jsonl", 3, pairing=Pairing("all")))) == 3
