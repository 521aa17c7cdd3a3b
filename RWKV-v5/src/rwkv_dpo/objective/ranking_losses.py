"""Losses of rankings: one value a ranking [R], of all answers to a prompt that are compared. Of a single pair all of them are DPO's."""

import torch
from torch import Tensor

from rwkv_dpo.batches.comparisons import Comparisons
from rwkv_dpo.objective.pair_losses import sigmoid
from rwkv_dpo.objective.preferences import Options, Preferences, margins


def all_pairs(p: Preferences, o: Options) -> Tensor:
    """A value a ranking: the mean of sigmoid over its pairs, each weighted by the difference of its scores."""
    weighted = p.compared.weights.to(p.logps.dtype) * sigmoid(p, o)
    return _by_ranking(weighted, p.compared.rankings[p.compared.pairs[:, 0]], p.compared)


def plackett_luce(p: Preferences, o: Options) -> Tensor:
    """A value a ranking: -log of the probability that Plackett and Luce's model gives it, the product over its answers of the softmax
    of each one's reward among its own and those of the answers below it (Rafailov et al. 2023, equation 20). Below an answer are
    those that it is chosen over in a pair; so answers of the same score are not compared."""
    return _by_ranking(_against_rejected(p, o), p.compared.rankings, p.compared)


def softmax(p: Preferences, o: Options) -> Tensor:
    """A value a ranking: -log softmax of the best answer's reward among its own and those of the answers that it is chosen over (Chen
    et al. 2024, "On Softmax Direct Preference Optimization for Recommendation", arXiv:2406.09215); the mean where several are best."""
    pairs, rankings = p.compared.pairs, p.compared.rankings
    is_best = torch.zeros_like(rankings, dtype=torch.bool).index_fill(0, pairs[:, 0], True)
    is_best = is_best.index_fill(0, pairs[:, 1], False).to(p.logps.dtype)
    sums = _by_ranking(is_best * _against_rejected(p, o), rankings, p.compared)
    return sums / _by_ranking(is_best, rankings, p.compared).clamp(min=1)


def _against_rejected(p: Preferences, o: Options) -> Tensor:
    """[answers] -log softmax of each answer's reward among its own and those of the answers that it is chosen over; 0 without any."""
    d, chosen = margins(p, o), p.compared.pairs[:, 0]
    # Around the largest, so that no exponential overflows: of 1, the answer itself, and exp(-d) of each answer below it.
    largest = d.new_zeros(p.compared.n_answers).scatter_reduce(0, chosen, -d.detach(), "amax")
    terms = torch.exp(-d - largest[chosen])
    return largest + torch.log(torch.exp(-largest).index_add(0, chosen, terms))


def _by_ranking(values: Tensor, rankings: Tensor, compared: Comparisons) -> Tensor:
    return values.new_zeros(compared.n_rankings).index_add(0, rankings, values)
