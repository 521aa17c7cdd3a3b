"""Losses of pairs: one value a pair [P], fp32 (or float64) and differentiable. Each names its paper and equation; x, y and d are those
of preferences.py."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_dpo.objective.preferences import Options, Preferences, margins, scores

_DISCOPOP_TEMPERATURE = 0.05


def sigmoid(p: Preferences, o: Options) -> Tensor:
    """DPO: Rafailov et al. 2023 (arXiv:2305.18290), equation 7."""
    return -F.logsigmoid(margins(p, o))


def smoothed(d: Tensor, o: Options) -> Tensor:
    """The expected sigmoid loss [P] of labels that are wrong with the probability label_smoothing."""
    return -(1 - o.label_smoothing) * F.logsigmoid(d) - o.label_smoothing * F.logsigmoid(-d)


def cdpo(p: Preferences, o: Options) -> Tensor:
    """Conservative DPO: Mitchell 2023, "A note on DPO with noisy preferences", equation 3."""
    return smoothed(margins(p, o), o)


def robust(p: Preferences, o: Options) -> Tensor:
    """An unbiased estimate of DPO's loss under wrong labels: Chowdhury et al. 2024 (arXiv:2403.00409), equation 12."""
    d, e = margins(p, o), o.label_smoothing
    return (-(1 - e) * F.logsigmoid(d) + e * F.logsigmoid(-d)) / (1 - 2 * e)


def hinge(p: Preferences, o: Options) -> Tensor:
    """SLiC: Zhao et al. 2023 (arXiv:2305.10425), equation 1, on DPO's margins; Liu et al. 2024 (arXiv:2309.06657), equation 12."""
    return torch.relu(1 - margins(p, o))


def ipo(p: Preferences, o: Options) -> Tensor:
    """Azar et al. 2023 (arXiv:2310.12036), equation 17, tau being beta; of means over tokens, as its authors compute it."""
    chosen, rejected = (scores(p, o) / p.lengths).unbind(1)
    return (chosen - rejected - 1 / (2 * o.beta)).square()


def sigmoid_norm(p: Preferences, o: Options) -> Tensor:
    """DPO of means over tokens: Lambert et al. 2024 (Tulu 3, arXiv:2411.15124), equation 6."""
    chosen, rejected = (scores(p, o) / p.lengths).unbind(1)
    return -F.logsigmoid(o.beta * (chosen - rejected))


def exo_pair(p: Preferences, o: Options) -> Tensor:
    """EXO: Ji et al. 2024 (arXiv:2402.00856), equation 16, epsilon being label_smoothing."""
    d, e = margins(p, o), o.label_smoothing
    return torch.sigmoid(d) * (F.logsigmoid(d) - math.log1p(-e)) + torch.sigmoid(-d) * (F.logsigmoid(-d) - math.log(e))


def nca_pair(p: Preferences, o: Options) -> Tensor:
    """NCA of two answers: Chen et al. 2024 (arXiv:2402.05369), appendix A."""
    x, y = (o.beta * p.ratios).unbind(1)
    return -F.logsigmoid(x) - 0.5 * F.logsigmoid(-x) - 0.5 * F.logsigmoid(-y)


def bco_pair(p: Preferences, o: Options) -> Tensor:
    """Binary classification of each answer: Jung et al. 2024 (arXiv:2404.04656), equation 9, with the reward shift at 0."""
    x, y = (o.beta * p.ratios).unbind(1)
    return -F.logsigmoid(x) - F.logsigmoid(-y)


def sppo_hard(p: Preferences, o: Options) -> Tensor:
    """SPPO: Wu et al. 2024 (arXiv:2405.00675), equation 4.7, with probabilities of 1 and 0."""
    x, y = p.ratios.unbind(1)
    return (x - 0.5 / o.beta).square() + (y + 0.5 / o.beta).square()


def apo_zero(p: Preferences, o: Options) -> Tensor:
    """APO for a model that is worse than the chosen answers: D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 7."""
    x, y = (o.beta * p.ratios).unbind(1)
    return torch.sigmoid(-x) + torch.sigmoid(y)


def apo_down(p: Preferences, o: Options) -> Tensor:
    """APO for a model that is better than the chosen answers: the same, equation 8."""
    x, y = (o.beta * p.ratios).unbind(1)
    return torch.sigmoid(x) + torch.sigmoid(y - x)


def discopop(p: Preferences, o: Options) -> Tensor:
    """Lu et al. 2024 (arXiv:2406.08414), equation 5: logistic and exponential loss, mixed by the margin."""
    d = margins(p, o)
    log_share = F.logsigmoid(d / _DISCOPOP_TEMPERATURE)
    # Their product in one exponential: exp(-d) alone overflows where the share vanishes.
    return torch.sigmoid(-d / _DISCOPOP_TEMPERATURE) * -F.logsigmoid(d) + torch.exp(log_share - d)


def dpop(p: Preferences, o: Options) -> Tensor:
    """DPO-Positive: Pal et al. 2024 (arXiv:2402.13228), equation 3: a chosen answer that becomes less likely costs extra."""
    x, y = p.ratios.unbind(1)
    return -F.logsigmoid(o.beta * (x - y - o.dpop_lambda * torch.relu(-x)))


def simpo(p: Preferences, o: Options) -> Tensor:
    """Meng et al. 2024 (arXiv:2405.14734), equation 6: means over tokens, and no reference."""
    chosen, rejected = (p.logps / p.lengths).unbind(1)
    return -F.logsigmoid(o.beta * (chosen - rejected) - o.simpo_gamma)


def orpo(p: Preferences, o: Options) -> Tensor:
    """Hong et al. 2024 (arXiv:2403.07691), equations 6 and 7, lambda being beta: the chosen answer's loss a token, and the odds of both
    answers against each other; no reference."""
    chosen, rejected = (p.logps / p.lengths).unbind(1)
    odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - o.beta * F.logsigmoid(odds)


def sft(p: Preferences, o: Options) -> Tensor:
    """Negative log-likelihood of the chosen answers, whose mean over pairs is the mean over all of their tokens."""
    mean_length = p.lengths[:, 0].mean() if p.chosen_lengths is None else p.chosen_lengths
    return -p.logps[:, 0] / mean_length


def aot(p: Preferences, o: Options) -> Tensor:
    """Melnyk et al. 2024 (arXiv:2406.05882), equation 7: the policy's differences, sorted over the batch, against the reference's."""
    sorted_policy, sorted_reference = (torch.sort(logps[:, 0] - logps[:, 1]).values for logps in (p.logps, p.ref_logps))
    return smoothed(o.beta * (sorted_policy - sorted_reference), o)


def aot_unpaired(p: Preferences, o: Options) -> Tensor:
    """The same, equation 8: log-ratios of all chosen answers against those of all rejected ones, each sorted."""
    chosen, rejected = (torch.sort(ratios).values for ratios in p.ratios.unbind(1))
    return smoothed(o.beta * (chosen - rejected), o)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0 (Maechler 2012)."""
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
