"""Figures of preparation, counted by hand, and the table of them."""

import numpy as np
import pytest
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.data.preference import Preference
from rwkv_dpo.data.prepare import prepare
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.data.trees import grow
from rwkv_dpo.report.figures import (
    histograms,
    length_percentiles,
    lost_shares,
    preferences,
    reference_summary,
    script_of,
    scripts,
    tree_figures,
)
from rwkv_dpo.report.look import look
from rwkv_dpo.report.table import as_table


def test_percentiles_are_lengths_that_occur():
    pairs = pack_pairs([([1] * n, [5] * 3 + [6] * n, [5] * min(n, 3) + [7]) for n in range(1, 101)])
    assert length_percentiles(pairs) == {
        "prompt": {"p50": 50, "p90": 90, "p99": 99, "max": 100},
        "chosen": {"p50": 53, "p90": 93, "p99": 102, "max": 103},
        "rejected": {"p50": 4, "p90": 4, "p99": 4, "max": 4},
        "common_prefix": {"p50": 3, "p90": 3, "p99": 3, "max": 3},
    }


def test_a_percentile_is_not_put_between_two_lengths():
    pairs = pack_pairs([([1] * n, [2], [3]) for n in (1, 10)])
    assert length_percentiles(pairs)["prompt"] == {"p50": 1, "p90": 10, "p99": 10, "max": 10}


def test_an_answer_that_the_other_one_begins_with_is_common_as_a_whole():
    assert length_percentiles(pack_pairs([([1], [2, 3], [2, 3, 4])]))["common_prefix"]["max"] == 2


def test_no_pairs_have_no_percentiles():
    assert length_percentiles(pack_pairs([])) == {}


def test_the_reference_is_summed_up_per_answer_and_per_token():
    pairs = pack_pairs([([1], [2, 3], [4]), ([1], [2, 3, 4, 5], [4, 4])], np.array([[-2.0, -3.0], [-7.0, -6.0]]))
    assert reference_summary(pairs) == {
        "chosen": {"mean": -4.5, "std": 2.5, "min": -7.0, "max": -2.0, "mean_per_token": -1.5},
        "rejected": {"mean": -4.5, "std": 1.5, "min": -6.0, "max": -3.0, "mean_per_token": -3.0},
        "ranked_right": 0.5,
    }


def test_the_table_has_every_figure_of_the_report():
    one = Preference("row 1", "", ("word " * 1229,), "Yes, it is.", "No", (3.5, 1.0))
    prepared = prepare([one], WorldTokenizer(), 4096, "chat", 0)
    looked = look(prepared, {"train": [0]}, WorldTokenizer(), 4096, 0)
    pairs = pack_pairs([([1] * 1234, [2, 3], [4])], np.array([[-2.0, -3.0]]))
    n = f"{prepared.pairs.lengths[0, 0]:,}"
    counts = {"read": 1300, "kept": 1, "dropped": {"tie": 1299}, "cut_prompts": 17, "cut_answers": 18, "cut_tokens": 19}
    table = as_table(counts, looked, reference_summary(pairs), {"trainset.save": {"pairs": 1, "sha256": "ab12"}})
    cells = [line.split() for line in table.splitlines()]
    for expected in ("rows read 1,300", "kept 1", "dropped 1,299", "tie 1,299", "prompts cut 17", "pairs with an answer cut 18",
                     "tokens cut 19", f"prompt {n} {n} {n} {n}", "chosen -2.00 0.00 -2.00 -2.00 -1.00",
                     "ranked correctly by the reference 100.0%", "longer answer preferred 100.0%",
                     "of 1 pairs 2.5 2.5 2.5 2.5", "prompts mostly Latin 1", "trainset.save 1 pairs sha256 ab12"):  # fmt: skip
        assert expected.split() in cells


def test_a_reason_that_takes_more_than_a_fifth_is_told():
    counts = {"read": 60, "kept": 50, "dropped": {"tie": 12, "duplicate": 13}, "cut_prompts": 10, "cut_answers": 43, "cut_tokens": 900}
    assert lost_shares(counts, 64) == [
        "13 of 60 rows were dropped: duplicate",
        "43 of 50 pairs lost the end of an answer to a ctx_len of 64",
    ]
    assert lost_shares({**counts, "read": 0, "kept": 0, "dropped": {}, "cut_prompts": 0, "cut_answers": 0}, 64) == []


@pytest.mark.parametrize("parts", [{}, {"looked": {}}, {"counts": None}])
def test_parts_that_are_not_there_take_no_line(parts):
    assert as_table(**parts) == ""


def test_scores_and_lengths_that_are_preferred_are_counted_by_hand():
    rows = [([1], [2, 3], [4]), ([1], [2], [4, 5]), ([1], [2], [3]), ([2], [7, 8, 9], [3])]
    told = preferences(pack_pairs(rows, scores=np.array([[5, 4.5], [3, 1], [np.nan, np.nan], [9, 1]])))
    assert told == {"longer_preferred": 2 / 3, "gaps": {"pairs": 3, "p50": 2.0, "p90": 8.0, "p99": 8.0, "max": 8.0}}
    assert preferences(pack_pairs([([1], [2], [3])])) == {"longer_preferred": None, "gaps": {"pairs": 0}}


def test_trees_are_counted_by_hand():
    rows = [([1, 1], [2], [3]), ([1, 1], [2], [4, 4]), ([5], [6], [7])]
    assert tree_figures(grow(pack_pairs(rows), 100).pairs) == {"trees": 2, "answers": 5, "most_pairs": 2, "most_tokens": 6}


@pytest.mark.parametrize(("text", "script"), [
    ("Why is the sky blue?", "Latin"), ("Почему GPU?", "Cyrillic"),
    ("天为什么是蓝的?", "CJK"), ("こんにちは", "Hiragana"),
    ("안녕", "Hangul"), ("مرحبا", "Arabic"), ("1 + 1 = ?", "none"), ("", "none"),
])  # fmt: skip
def test_a_text_is_in_the_script_of_most_of_its_letters(text, script):
    assert script_of(text) == script
    assert scripts([text, text]) == {script: 2}


def test_bars_hold_every_pair():
    rng = np.random.default_rng(0)
    pairs = pack_pairs([tuple([1] * n for n in rng.integers(1, 300, 3)) for _ in range(50)], scores=rng.random((50, 2)) + np.array([1, 0]))
    told = histograms(pairs)
    assert {sum(bars) for histogram in told.values() for bars in histogram["counts"].values()} == {50}
    assert set(told["tokens"]["counts"]) == {"prompt", "chosen", "rejected"}
    assert "gaps" not in histograms(pack_pairs([([1], [2], [3])]))
