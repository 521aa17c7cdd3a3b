"""What preference losses are functions of: log-probabilities and lengths of answers, and options.

x and y are the log-ratios log p(answer) - log p_ref(answer) of the chosen and the rejected answer, d is beta (f(x) - f(y)), where f is
the log-ratio itself, or what --dpo_f_divergence makes of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_dpo.batches.comparisons import Comparisons


class Preferences(NamedTuple):
    """P pairs under a policy. logps, ref_logps: fp32 [P, 2], sums over the tokens of the chosen and the rejected answer, nats. lengths:
    [P, 2], of the same dtype, these tokens. weights: [P], by which the pairs' losses are multiplied; None: 1 each. chosen_lengths: [P],
    mean tokens of the chosen answers among which a pair counts; None: those of all P."""

    logps: Tensor
    ref_logps: Tensor
    lengths: Tensor
    compared: Comparisons
    weights: Tensor | None = None
    chosen_lengths: Tensor | None = None

    @property
    def ratios(self) -> Tensor:
        """[P, 2] log-ratios."""
        return self.logps - self.ref_logps


def preferences(logps: Tensor, ref_logps: Tensor, compared: Comparisons) -> Preferences:
    """Of the pairs of a batch. Where the reference is unknown (NaN), it is taken to find all answers equally likely."""
    known = torch.nan_to_num(ref_logps.to(logps.dtype), nan=0.0)
    return Preferences(logps, known, compared.lengths[compared.pairs].to(logps.dtype), compared)


@dataclass(frozen=True)
class Options:
    """What losses depend on beside their data, by the names of their flags."""

    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    dpop_lambda: float = 50.0
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    ld_alpha: float = 1.0


Loss = Callable[[Preferences, Options], Tensor]


def scores(p: Preferences, o: Options) -> Tensor:
    """f of the log-ratios [P, 2]: the derivative of an f-divergence's f at t = p / p_ref (Wang et al. 2024, arXiv:2309.16240, table 1)."""
    x = p.ratios
    if o.f_divergence == "reverse_kl":
        return x
    if o.f_divergence == "forward_kl":
        return -torch.expm1(-x)
    if o.f_divergence == "js":
        return math.log(2) + F.logsigmoid(x)
    # (t**(alpha - 1) - 1) / (alpha - 1), which becomes log t as alpha goes to 1.
    power = o.f_alpha - 1
    return torch.expm1(power * x) / power if power else x


def margins(p: Preferences, o: Options) -> Tensor:
    """d [P]."""
    chosen, rejected = (o.beta * scores(p, o)).unbind(1)
    return chosen - rejected
