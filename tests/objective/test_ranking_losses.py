"""Losses of whole rankings: against their formulas in plain Python, torch's cross-entropy, and what a probability has to sum to."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.batches.comparisons import compare
from rwkv_dpo.data.rankings import Pairing, pairs_of
from rwkv_dpo.objective.losses import LOSSES
from rwkv_dpo.objective.preferences import Options, preferences
from rwkv_dpo.objective.settings import LOSSES_OF_RANKINGS

rewards_of = st.lists(st.floats(-30, 30), min_size=2, max_size=5)


def compared(rankings, rank_pairs="all"):
    """Of rankings that are given by their answers' scores: the comparisons, and for each pair the numbers of its answers, counted over
    all rankings."""
    pairs, trees, scores, numbers, first = [], [], [], [], 0
    for ranking, of_answers in enumerate(rankings):
        made = pairs_of(of_answers, Pairing(rank_pairs))
        trees.append(range(len(pairs), len(pairs) + len(made)))
        for better, worse in made:
            pairs.append((np.array([ranking]), np.array([better]), np.array([worse])))
            scores.append((of_answers[better], of_answers[worse]))
            numbers.append((first + better, first + worse))
        first += len(of_answers)
    return compare(pairs, trees, np.array(scores, dtype=np.float64).reshape(-1, 2))[0], torch.tensor(numbers).reshape(-1, 2)


def losses(name, rankings, rewards, rank_pairs="all"):
    """A value a ranking, of a reward for every answer of every ranking, in their order."""
    graph, numbers = compared(rankings, rank_pairs)
    logps = torch.tensor([value for of_ranking in rewards for value in of_ranking], dtype=torch.float64)[numbers]
    return LOSSES[name](preferences(logps, torch.zeros_like(logps), graph), Options(1.0))


@given(rewards_of)
def test_plackett_luce_is_minus_the_log_of_the_product_of_its_formula(rewards):
    """Answers from the best to the worst: equation 20 of arXiv:2305.18290."""
    places = range(len(rewards))
    product = math.prod(math.exp(rewards[k]) / sum(math.exp(rewards[j]) for j in places[k:]) for k in places)
    got = losses("plackett_luce", [[-place for place in places]], [rewards])
    assert got.item() == pytest.approx(-math.log(product), rel=1e-9, abs=1e-12)


@given(rewards_of)
def test_the_probabilities_of_all_rankings_sum_to_one(rewards):
    orders = list(itertools.permutations(range(len(rewards))))
    got = losses("plackett_luce", orders, [rewards] * len(orders))
    assert torch.exp(-got).sum().item() == pytest.approx(1, rel=1e-9)


@given(rewards_of)
def test_softmax_is_the_cross_entropy_of_the_best(rewards):
    want = F.cross_entropy(torch.tensor([rewards], dtype=torch.float64), torch.tensor([0]))
    for rank_pairs in ("all", "best_rest"):
        got = losses("softmax", [[-place for place in range(len(rewards))]], [rewards], rank_pairs)
        assert got.item() == pytest.approx(want.item(), rel=1e-9, abs=1e-12)


def test_pairs_weigh_as_much_as_their_scores_differ_by_hand():
    """Scores 5, 4 and 1: pairs that differ by 1, 4 and 3. Rewards 0.5, -1 and 2."""
    def pair(margin):
        return math.log1p(math.exp(-margin))

    want = (1 * pair(1.5) + 4 * pair(-1.5) + 3 * pair(-3)) / 8
    got = losses("all_pairs", [[5, 4, 1], [2, 1]], [[0.5, -1, 2], [3, 1]])
    assert got.tolist() == pytest.approx([want, pair(2)], rel=1e-6)  # weights are fp32


@pytest.mark.parametrize("name", LOSSES_OF_RANKINGS)
def test_a_ranking_of_two_is_a_pair(name):
    rewards = [[3.0, 1.0], [-2.0, 5.0], [0.0, 0.0]]
    got = losses(name, [[1, 0]] * 3, rewards)
    torch.testing.assert_close(got, losses("sigmoid", [[1, 0]] * 3, rewards), rtol=1e-12, atol=0)


def test_answers_of_the_same_score_are_not_compared():
    """The middle two each stand against the last one, and the first against all."""
    a, b, c, d = 0.3, -1.0, 2.0, 0.7
    e = math.exp
    want = -math.log(e(a) / (e(a) + e(b) + e(c) + e(d))) - math.log(e(b) / (e(b) + e(d))) - math.log(e(c) / (e(c) + e(d)))
    assert losses("plackett_luce", [[9, 5, 5, 1]], [[a, b, c, d]]).item() == pytest.approx(want, rel=1e-12)


def test_the_mean_of_several_best_answers_counts():
    got = losses("softmax", [[5, 5, 1]], [[0.4, -1.0, 0.2]])
    want = (math.log1p(math.exp(-0.2)) + math.log1p(math.exp(1.2))) / 2
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_pairs_without_scores_weigh_alike_even_beside_one_that_has_them():
    pairs = [tuple(np.array([token]) for token in row) for row in ([0, 1, 2], [0, 3, 4], [5, 1, 2])]
    graph, _ = compare(pairs, [[0, 1], [2]], np.array([[4.0, 1.0], [np.nan, np.nan], [9.0, 1.0]]))
    assert graph.weights.tolist() == [0.5, 0.5, 1.0]
    assert graph.n_rankings == 2


@pytest.mark.parametrize("name", LOSSES_OF_RANKINGS)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_gradients_are_finite_and_right_whatever_the_margins(name, size):
    graph, numbers = compared([[3, 2, 1], [1, 0], [1, 4, 2, 4]])
    rewards = torch.tensor([0.1, -0.9, 0.5, 0.4, -0.2, 0.9, 0.3, -0.6, 0.8], dtype=torch.float64) * size
    rewards.requires_grad_()

    def loss(values):
        refs = torch.zeros(len(numbers), 2, dtype=torch.float64)
        return LOSSES[name](preferences(values[numbers], refs, graph), Options(1.0)).mean()

    (gradient,) = torch.autograd.grad(loss(rewards), rewards)
    assert torch.isfinite(gradient).all()
    if size == 1:
        assert torch.autograd.gradcheck(loss, rewards)
