"""Figures of several columns, by hand and against scipy."""

import math
from itertools import pairwise

import numpy as np
import pytest
from rwkv_dpo.data.pairs import PairSet, pack_pairs
from rwkv_dpo.data.trees import grow
from rwkv_dpo.evaluation.compare import Scores, compare, corpus_figures, pair_figures
from rwkv_dpo.evaluation.divergence import WindowScores
from rwkv_dpo.evaluation.scoring import pair_means, prompt_numbers
from rwkv_dpo.objective.losses import Mixture, dpo
from rwkv_dpo.objective.preferences import Options
from scipy import stats


def pairs_of(n: int, is_scored: bool = True) -> PairSet:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 61, 3), rng.integers(0, 61, rng.integers(1, 30)), rng.integers(0, 61, rng.integers(1, 30))) for _ in range(n)]
    return pack_pairs(rows, rng.normal(-20, 5, (n, 2)) if is_scored else None)


def scores_of(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(-20, 5, (n, 2))


def test_equal_columns_differ_by_nothing_and_others_as_scipy_says():
    pairs, scores = pairs_of(80), [scores_of(80, 1), scores_of(80, 1), scores_of(80, 2)]
    first, same, other = pair_figures(pairs, scores, [dpo(0.1)] * 3, seed=0)
    assert "differences" not in first
    assert set(same["differences"]) == {"logps/accuracies", "logps/margins", "rewards/accuracies", "rewards/margins"}
    assert all(one == {"mean": 0, "interval": [0, 0]} for one in same["differences"].values())
    assert same["intervals"] == first["intervals"]
    apart = (scores[2][:, 0] - scores[2][:, 1]) - (scores[0][:, 0] - scores[0][:, 1])
    want = stats.bootstrap((apart,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    got = other["differences"]
    assert got["logps/margins"]["mean"] == pytest.approx(apart.mean())
    assert got["logps/margins"]["interval"] == pytest.approx(list(want), abs=0.06 * (want[1] - want[0]))
    # Of the same pairs and with the same beta, rewards differ as margins do: the reference falls out.
    assert got["rewards/margins"]["interval"] == pytest.approx([0.1 * bound for bound in got["logps/margins"]["interval"]])


def test_figures_are_those_of_the_metrics_and_their_intervals_hold_them():
    pairs, scores = pairs_of(60), scores_of(60, 1)
    (got,) = pair_figures(pairs, [scores], [dpo(0.3)], seed=0)
    want = pair_means(scores, pairs, dpo(0.3))
    assert {name: got[name] for name in want} == want
    assert got["logps/margins"] == want["logps/chosen"] - want["logps/rejected"]
    for name, (low, high) in got["intervals"].items():
        assert low < got[name] < high
    assert (got["dpo_beta"], got["n_pairs"], got["n_prompts"]) == (0.3, 60, 60)
    rewards = 0.3 * ((scores - pairs.ref_logps)[:, 0] - (scores - pairs.ref_logps)[:, 1])
    assert got["calibration"]["log_loss"] == pytest.approx(np.log1p(np.exp(-rewards)).mean())
    # DPO's own loss is that log loss.
    assert got["loss_dpo"] == pytest.approx(got["calibration"]["log_loss"])
    assert sum(got["margins"]["pairs"]) == 60
    assert len(got["margins"]["edges"]) == 31


def test_each_column_has_the_beta_of_its_run():
    pairs, scores = pairs_of(20), scores_of(20, 1)
    one, other = pair_figures(pairs, [scores, scores], [dpo(0.1), dpo(0.4)], seed=0)
    assert other["rewards/margins"] == pytest.approx(4 * one["rewards/margins"])
    assert other["differences"]["rewards/margins"]["mean"] == pytest.approx(3 * one["rewards/margins"])
    assert other["intervals"]["rewards/margins"] == pytest.approx([4 * bound for bound in one["intervals"]["rewards/margins"]])


def test_pairs_without_a_reference_have_no_rewards_whatever_the_loss():
    """SimPO needs none to be trained; rewards do."""
    mixture = Mixture({"simpo": 1.0}, Options(2.0))
    (got,) = pair_figures(pairs_of(20, is_scored=False), [scores_of(20, 1)], [mixture], seed=0)
    assert "loss_dpo" in got
    assert not {"dpo_beta", "calibration"} & set(got)
    names = [*got, *got["intervals"], *got["lengths"]["correlations"]]
    assert not [name for name in names if name.startswith(("rewards/", "ref_"))]


def test_pairs_of_a_prompt_are_resampled_together():
    """Eight pairs of each of ten prompts, in trees or by themselves."""
    rng = np.random.default_rng(0)
    rows = [([prompt, 1], rng.integers(0, 61, 5), rng.integers(0, 61, 6)) for prompt in range(10) for _ in range(8)]
    alone = pack_pairs(rows, np.zeros((80, 2)))
    grown = grow(alone, 10_000).pairs
    assert grown.n_trees == 10
    scores = np.repeat(rng.normal(0, 1, (10, 2)), 8, axis=0)
    of_alone, of_grown = (pair_figures(pairs, [scores], [dpo(0.1)], seed=0)[0] for pairs in (alone, grown))
    assert prompt_numbers(alone).tolist() == prompt_numbers(grown).tolist() == np.repeat(np.arange(10), 8).tolist()
    assert of_alone["intervals"] == of_grown["intervals"]
    assert of_alone["n_prompts"] == 10
    margins = scores[::8, 0] - scores[::8, 1]
    want = stats.bootstrap((margins,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert of_alone["intervals"]["logps/margins"] == pytest.approx(list(want), abs=0.06 * (want[1] - want[0]))


def test_one_prompt_has_no_interval_and_a_broken_model_no_figures():
    pairs = pairs_of(3)
    (got,) = pair_figures(pairs.select([0]), [scores_of(1, 1)], [dpo(0.1)], seed=0)
    assert set(got["intervals"].values()) == {None}
    scores = scores_of(3, 1)
    scores[1] = math.nan
    with np.errstate(all="raise"):
        (got,) = pair_figures(pairs, [scores], [dpo(0.1)], seed=0)
        (nothing,) = pair_figures(pairs, [np.full((3, 2), math.nan)], [dpo(0.1)], seed=0)
    assert math.isnan(got["logps/margins"])
    assert got["calibration"] is got["intervals"]["logps/margins"] is got["lengths"]["correlations"]["logps"] is None
    assert (sum(got["margins"]["pairs"]), sum(nothing["margins"]["pairs"])) == (2, 0)


def test_corpora():
    losses = [np.random.default_rng(seed).normal(3, 0.5, 50) for seed in (0, 1)]
    far = np.random.default_rng(2).random(50)
    first, other = corpus_figures([WindowScores(losses[0], 0 * far), WindowScores(losses[1], far)], True, seed=0)
    assert (first["kl"], other["kl"]) == (0, pytest.approx(far.mean()))
    assert other["corpus_perplexity"] == pytest.approx(math.exp(losses[1].mean()))
    assert other["differences"]["corpus_loss"]["mean"] == pytest.approx((losses[1] - losses[0]).mean())
    low, high = other["differences"]["corpus_loss"]["interval"]
    want = stats.bootstrap((losses[1] - losses[0],), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0))
    assert [low, high] == pytest.approx(list(want.confidence_interval), abs=0.06 * (high - low))
    assert set(first["intervals"]) == {"corpus_loss"}
    assert other["intervals"]["kl"][0] < far.mean() < other["intervals"]["kl"][1]
    (alone,) = corpus_figures([WindowScores(np.array([1e6]), np.zeros(1))], False, seed=0)
    assert (alone["corpus_perplexity"], alone["n_windows"], alone["intervals"]) == (math.inf, 1, {"corpus_loss": None})
    # Other vocabularies make other windows: nothing is paired.
    _, longer = corpus_figures([WindowScores(losses[0], 0 * far), WindowScores(losses[1][:7], far[:7])], False, seed=0)
    assert "differences" not in longer


def test_a_report_has_what_is_alone_of_its_kind_itself_too():
    pairs, windows = {name: pairs_of(4) for name in "ab"}, {name: WindowScores(np.array([1.0, 2.0]), np.zeros(2)) for name in "cd"}
    scores = Scores({name: scores_of(4, 1) for name in "ab"}, windows, {"Why?": "So.", "How?": "Thus."})
    (several,) = compare(["m.pth"], pairs, [scores], [dpo(0.1)], False, 0)
    assert set(several) == {"checkpoint", "pairs", "corpora", "answers"}
    alone = Scores({"a": scores.pairs["a"]}, {"c": windows["c"]}, {"Why?": "So."})
    (one,) = compare(["m.pth"], {"a": pairs["a"]}, [alone], [dpo(0.1)], False, 0)
    # The names that a report had when there was one file of each, and mean lengths.
    assert set(one) == {
        "checkpoint", "loss_dpo", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
        "logps/rejected", "ref_logps/chosen", "ref_logps/rejected", "logps/accuracies", "logps/margins", "dpo_beta", "corpus_loss",
        "corpus_perplexity", "answer", "pairs", "corpora", "answers", "lengths/chosen", "lengths/rejected", "lengths/preferred",
    }  # fmt: skip
    assert several["pairs"]["a"] == one["pairs"]["a"]
    assert (one["corpus_loss"], one["answer"], one["rewards/margins"]) == (1.5, "So.", one["pairs"]["a"]["rewards/margins"])


@pytest.mark.parametrize("middle", [0.0, -3.0, 1e15, -3e38])
def test_margins_that_are_all_but_equal_have_a_histogram(middle):
    scores = np.stack([np.full(4, middle) * (1 + np.array([0, 1, 2, 3]) * 2**-52), np.zeros(4)], 1)
    (figures,) = pair_figures(pairs_of(4), [scores], [dpo(0.1)], 0)
    edges, counts = figures["margins"]["edges"], figures["margins"]["pairs"]
    assert len(edges) == len(counts) + 1
    assert all(low < high for low, high in pairwise(edges))
    assert sum(counts) == 4


def test_the_reference_itself_is_neither_always_nor_never_right():
    """All of its rewards are 0, of which TRL's strict comparison makes an accuracy of 0: no other model is better than it by that."""
    pairs = pairs_of(12)
    first, second = pair_figures(pairs, [pairs.ref_logps, scores_of(12, 1)], [dpo(0.1)] * 2, 0)
    assert first["rewards/accuracies"] == 0
    assert first["intervals"]["rewards/accuracies"] is None
    assert first["intervals"]["rewards/margins"] == [0.0, 0.0]
    assert second["intervals"]["rewards/accuracies"] is not None
    assert second["differences"]["rewards/accuracies"]["interval"] is None
    assert second["differences"]["rewards/margins"]["interval"] is not None
    assert {group["accuracies"]["rewards"] for group in first["lengths"]["groups"]} == {None}
    assert first["calibration"]["ece"] == 0
