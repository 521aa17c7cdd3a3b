"""Calibration against torchmetrics and scipy, and by hand."""

import math

import numpy as np
import pytest
import torch
from rwkv_dpo.evaluation.calibration import calibration
from scipy.special import expit, log_expit
from torchmetrics.functional.classification import multiclass_calibration_error


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_an_independent_computation_finds_the_same(scale):
    margins = np.random.default_rng(0).normal(0.3, 1, 500) * scale
    got = calibration(margins)
    # Twenty bins from 0 to 1 are ten from 0.5, below which the confidence of the preferred of two never is.
    probabilities = torch.from_numpy(np.stack([expit(-margins), expit(margins)], axis=1))
    want = multiclass_calibration_error(probabilities, torch.ones(500, dtype=torch.int64), num_classes=2, n_bins=20, norm="l1")
    # torchmetrics has fp32 bins.
    assert got["ece"] == pytest.approx(float(want), abs=1e-6)
    assert got["brier"] == pytest.approx(np.mean((expit(margins) - 1) ** 2))
    assert got["log_loss"] == pytest.approx(-log_expit(margins).mean())
    assert [one["pairs"] for one in got["bins"]] == np.histogram(expit(np.abs(margins)), np.linspace(0.5, 1, 11))[0].tolist()


def test_four_pairs_by_hand():
    """Three are 62 % sure, of which two are right; one is 97 % sure and right."""
    sure, surer = math.log(0.62 / 0.38), math.log(0.97 / 0.03)
    got = calibration(np.array([sure, -sure, sure, surer]))
    assert got["ece"] == pytest.approx((3 * abs(2 / 3 - 0.62) + 1 * abs(1 - 0.97)) / 4)
    assert got["brier"] == pytest.approx((2 * 0.38**2 + 0.62**2 + 0.03**2) / 4)
    assert got["log_loss"] == pytest.approx(-(2 * math.log(0.62) + math.log(0.38) + math.log(0.97)) / 4)
    filled = {round(one["from"], 2): one for one in got["bins"] if one["pairs"]}
    assert {low: one["pairs"] for low, one in filled.items()} == {0.6: 3, 0.95: 1}
    assert filled[0.6]["accuracy"] == pytest.approx(2 / 3)
    assert filled[0.6]["confidence"] == pytest.approx(0.62)
    assert got["bins"][0] == {"from": 0.5, "to": pytest.approx(0.55), "pairs": 0, "confidence": None, "accuracy": None}


def test_a_model_that_prefers_neither_is_not_wrong():
    """As the reference itself is: every margin is 0."""
    got = calibration(np.zeros(3))
    assert (got["ece"], got["brier"], got["log_loss"]) == (0, 0.25, pytest.approx(math.log(2)))


def test_the_order_of_a_pair_says_nothing():
    """Half the pairs turned around: confidence stays, and what was right is wrong."""
    margins = np.random.default_rng(1).normal(0, 2, 200)
    got, turned = calibration(margins), calibration(-margins)
    for one, other in zip(got["bins"], turned["bins"], strict=True):
        assert one["confidence"] == other["confidence"]
        assert one["accuracy"] == pytest.approx(1 - other["accuracy"])


def test_margins_beyond_what_exp_takes_and_no_numbers():
    with np.errstate(over="raise"):
        got = calibration(np.array([1e5, -1e5]))
    assert (got["ece"], got["brier"], got["log_loss"]) == (0.5, 0.5, 5e4)
    assert got["bins"][-1]["pairs"] == 2
    assert calibration(np.array([0.1, math.nan])) is None
