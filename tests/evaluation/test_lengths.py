"""Accuracy by length, by hand and against numpy."""

import math

import numpy as np
import pytest
from rwkv_dpo.evaluation.lengths import GROUPS, by_length
from scipy import stats


def test_groups_by_hand_and_their_bounds():
    lengths = np.array([
        (5, 10), (5, 11),  # half as long or less
        (6, 10), (8, 10),  # shorter
        (9, 10), (10, 10), (10, 9),  # within a tenth
        (10, 8),  # longer
        (10, 5), (1, 0),  # twice as long or more
    ])  # fmt: skip
    margins = np.array([1, -1, 1, 1, -1, 0, 1, -1, 2, 3], np.float64)
    got = by_length(lengths, {"logps": margins, "rewards": -margins})
    assert [(one["chosen_is"], one["pairs"]) for one in got["groups"]] == list(zip(GROUPS, (2, 2, 3, 1, 2), strict=True))
    assert [one["accuracies"]["logps"] for one in got["groups"]] == [0.5, 1, pytest.approx(1 / 3), 0, 1]
    assert [one["accuracies"]["rewards"] for one in got["groups"]] == [0.5, 0, pytest.approx(1 / 3), 1, 0]
    assert got["longer_is_chosen"] == pytest.approx((4 + 0.5) / 10)
    assert got["correlations"]["logps"] == pytest.approx(stats.pearsonr(lengths[:, 0] - lengths[:, 1], margins).statistic)
    assert got["correlations"]["rewards"] == pytest.approx(-got["correlations"]["logps"])


def test_what_has_no_number_is_none():
    got = by_length(np.array([(3, 3), (4, 4)]), {"logps": np.array([1.0, 2.0]), "rewards": np.array([1.0, math.nan])})
    assert got["correlations"] == {"logps": None, "rewards": None}
    assert got["longer_is_chosen"] == 0.5
    assert got["groups"][0] == {"chosen_is": "much shorter", "pairs": 0, "accuracies": {"logps": None, "rewards": None}}


def test_a_model_of_length_alone_shows():
    """One whose margin is the difference of lengths: right wherever the chosen answer is longer, and nowhere else."""
    lengths = np.random.default_rng(0).integers(1, 100, (400, 2))
    got = by_length(lengths, {"logps": (lengths[:, 0] - lengths[:, 1]).astype(np.float64)})
    assert [one["accuracies"]["logps"] for one in got["groups"]][::2] != [0, 0, 0]
    assert [got["groups"][i]["accuracies"]["logps"] for i in (0, 1, 3, 4)] == [0, 0, 1, 1]
    assert got["correlations"]["logps"] == pytest.approx(1)
