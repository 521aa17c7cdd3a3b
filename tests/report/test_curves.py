"""Curves: any number of steps, thinned without hiding anything that a page could show."""

import numpy as np
import pytest
from rwkv_dpo.report.columns import Columns
from rwkv_dpo.report.curves import MOST, charts, extremes, means, smoothed


def test_columns_keep_their_places_whatever_a_record_lacks():
    more = [{"a": 9}, {"step": 4, "a": 3, "e": [0.25, 0.75]}]
    columns = Columns([{"step": 1, "a": 1}, {"step": 2, "b": 2.5, "c": None, "d": "text"}, *more])
    assert columns.steps.tolist() == [1, 2, 4]
    np.testing.assert_array_equal(columns["a"], [1, np.nan, 3])
    np.testing.assert_array_equal(columns["b"], [np.nan, 2.5, np.nan])
    np.testing.assert_array_equal(columns["e/high"], [np.nan, np.nan, 0.75])
    assert ("a" in columns, "c" in columns, "d" in columns) == (True, False, False)
    assert np.isnan(columns["never"]).tolist() == [True] * 3


def test_a_step_that_is_done_again_takes_the_place_of_what_was_after_it():
    columns = Columns({"step": step, "loss": loss} for step, loss in ((1, 10), (2, 20), (3, 30), (2, 21), (3, 31), (4, 41)))
    assert columns.steps.tolist() == [1, 2, 3, 4]
    assert columns["loss"].tolist() == [10, 21, 31, 41]


@pytest.mark.parametrize("n", [1, 2, 7, MOST, MOST + 1, 1009, 100_000])
def test_thinned_curves_are_small_and_lose_neither_ends_nor_extremes(n):
    steps, values = np.arange(n, dtype=float), np.random.default_rng(n).normal(size=n)
    values[n // 3] = 99.0
    for thin in (means, extremes):
        thin_steps, thinned = thin(steps, values)
        assert len(thin_steps) == len(thinned) <= MOST
        assert (np.diff(thin_steps) >= 0).all()
        if n <= MOST:
            assert thinned.tolist() == values.tolist()
    assert {values.min(), 99.0} <= set(extremes(steps, values)[1])
    thin_steps, thinned = means(steps, values)
    assert (thin_steps[0], thin_steps[-1], thinned[0], thinned[-1]) == (0, n - 1, values[0], values[-1])


def test_means_are_of_all_values():
    steps, values = np.arange(1000.0), np.arange(1000.0) ** 2
    _, thinned = means(steps, values, most=10)
    assert thinned[1:-1] == pytest.approx([np.mean(values[i : i + 100]) for i in range(100, 900, 100)])


@pytest.mark.parametrize("n", [1, 2, 3, 100, 501])
def test_smooth_values_are_means_of_those_around(n):
    values, reach = np.random.default_rng(n).normal(size=n), max(n // 40, 1)
    assert smoothed(values) == pytest.approx([values[max(i - reach, 0) : i + reach + 1].mean() for i in range(n)])


def titles(train=(), held_out=()):
    return [chart.title for chart in charts(Columns(train), Columns(held_out))]


def test_a_run_has_the_charts_that_it_has_figures_for():
    pairs = {"loss": 1.0, "loss_dpo": 0.7, "rewards/accuracies": 0.5, "rewards/margins": 0.1, "logps/chosen": -3.0, "logps/rejected": -3.0,
             "ref_logps/chosen": -2.0, "ref_logps/rejected": -2.0}  # fmt: skip
    of_pairs = ["Accuracy", "Margin", "Change of log-probabilities"]
    assert titles() == []
    assert titles([{"step": 1, "loss": 2.0, "loss_general": 2.0, "lr": 0.1}]) == ["Corpus loss", "Learning rate"]
    assert titles([{"step": 1, **pairs}]) == ["Preference loss", *of_pairs]
    assert titles([{"step": 1, "loss_general": 2.0, **pairs}]) == ["Loss", "Preference loss", "Corpus loss", *of_pairs]
    assert titles([], [{"step": 0, "corpus_loss": 2.0, "lengths/preferred": 9.0}]) == ["Corpus loss", "Length"]


def test_drift_is_since_the_first_evaluation_and_else_from_the_reference():
    train = [{"step": i + 1, "logps/chosen": -30.0 - i, "ref_logps/chosen": -30.0} for i in range(3)]
    held_out = [{"step": 10 * i, "logps/chosen": -20.0 + i, "logps/rejected": -25.0 - 2 * i} for i in range(3)]
    (chart,) = charts(Columns(), Columns(held_out))
    assert [curve.values.tolist() for curve in chart.curves] == [[0, 1, 2], [0, -2, -4]]
    (chart,) = charts(Columns(train), Columns(held_out[:1]))
    assert chart.curves[0].values.tolist() == pytest.approx([-0.5, -1, -1.5])


def test_a_spike_of_a_single_step_does_not_flatten_the_rest():
    losses = np.full(1000, 0.5) + np.random.default_rng(0).normal(size=1000) * 0.1
    losses[500] = 1e6
    steps = [{"step": i, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(losses)]
    steps[700]["loss"] = None  # as a step that isn't finite is written
    loss = charts(Columns(steps), Columns())[0]
    assert loss.bounds[1] < 2
    assert [curve.style for curve in loss.curves] == ["raw", "line"]
    assert loss.curves[0].values.max() == 1e6
    assert loss.curves[1].values.max() < 1
    constant = next(chart for chart in charts(Columns(steps), Columns()) if chart.title == "Gradient norm")
    assert constant.bounds == pytest.approx((0.95, 1.05))


def test_the_accuracy_of_a_model_that_is_its_own_reference_is_not_drawn():
    held_out = Columns(
        {"step": step, "rewards/accuracies": share, "rewards/accuracies_95": [share / 2, (1 + share) / 2], "rewards/margins": margin}
        for step, share, margin in ((0, 0.0, 0.0), (2, 0.0, -0.5), (4, 0.75, 0.5))
    )
    drawn = {chart.title: chart.curves for chart in charts(Columns(), held_out)}
    assert [curve.steps.tolist() for curve in drawn["Accuracy"]] == [[2, 4], [2, 4]]
    assert drawn["Margin"][0].steps.tolist() == [0, 2, 4]
