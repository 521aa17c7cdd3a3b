"""The losses, as pure functions of log-probabilities. Everything here is fp32 (or float64) and differentiable."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_dpo.batches.comparisons import Comparisons

# RWKV-LM's pull of each row's largest logit towards 0, which keeps logits in the range of bf16.
L2WRAP_FACTOR = 1e-4


class DPOTerms(NamedTuple):
    """What a preference loss is the mean of, and the rewards that it compares."""

    losses: Tensor  # [pairs] or [rankings], as the loss has it
    chosen_rewards: Tensor  # [pairs] beta * (logp - ref_logp), as TRL names it; no gradient
    rejected_rewards: Tensor  # [pairs]


def dpo_loss(logps: Tensor, ref_logps: Tensor, beta: float, compared: Comparisons | None = None, loss: str = "sigmoid") -> DPOTerms:
    """One of DPO_LOSSES. logps, ref_logps [pairs, 2]: sums of log-probabilities over the tokens of the chosen and the rejected answer,
    in nats, under the policy and the reference. compared: the pairs; sigmoid takes each by itself and needs none."""
    chosen_rewards, rejected_rewards = (beta * (logps - ref_logps)).unbind(1)
    margins = chosen_rewards - rejected_rewards
    losses = sigmoid(margins) if compared is None else DPO_LOSSES[loss](margins, compared)
    return DPOTerms(losses, chosen_rewards.detach(), rejected_rewards.detach())


def sigmoid(margins: Tensor, compared: Comparisons | None = None) -> Tensor:
    """Rafailov et al. 2023 (arXiv:2305.18290), equation 7, one value a pair, of the margins [pairs] of its rewards."""
    return -F.logsigmoid(margins)


def all_pairs(margins: Tensor, compared: Comparisons) -> Tensor:
    """One value a ranking: the mean of sigmoid over its pairs, each weighted by the difference of its scores."""
    weighted = compared.weights.to(margins.dtype) * sigmoid(margins)
    rankings = compared.rankings[compared.pairs[:, 0]]
    return margins.new_zeros(compared.n_rankings).index_add(0, rankings, weighted)


def plackett_luce(margins: Tensor, compared: Comparisons) -> Tensor:
    """One value a ranking: -log of the probability that Plackett and Luce's model gives it, the product over its answers of the softmax
    of each one's reward among its own and those of the answers below it (Rafailov et al. 2023, equation 20). Below an answer are
    those that it is chosen over in a pair; so answers of the same score are not compared."""
    values = _against_rejected(margins, compared)
    return margins.new_zeros(compared.n_rankings).index_add(0, compared.rankings, values)


def softmax(margins: Tensor, compared: Comparisons) -> Tensor:
    """One value a ranking: -log softmax of the best answer's reward among its own and those of the answers that it is chosen over (Chen
    et al. 2024, "On Softmax Direct Preference Optimization for Recommendation", arXiv:2406.09215); the mean where several are best."""
    is_best = torch.zeros_like(compared.rankings, dtype=torch.bool).index_fill(0, compared.pairs[:, 0], True)
    is_best = is_best.index_fill(0, compared.pairs[:, 1], False).to(margins.dtype)
    sums, counts = (
        margins.new_zeros(compared.n_rankings).index_add(0, compared.rankings, part)
        for part in (is_best * _against_rejected(margins, compared), is_best)
    )
    return sums / counts.clamp(min=1)


def _against_rejected(margins: Tensor, compared: Comparisons) -> Tensor:
    """[answers] -log softmax of each answer's reward among its own and those of the answers that it is chosen over; 0 without any."""
    chosen, n = compared.pairs[:, 0], compared.n_answers
    # Around the largest, so that no exponential overflows: of 1, the answer itself, and exp(-margin) of each answer below it.
    largest = margins.new_zeros(n).scatter_reduce(0, chosen, -margins.detach(), "amax")
    terms = torch.exp(-margins - largest[chosen])
    return largest + torch.log(torch.exp(-largest).index_add(0, chosen, terms))


DPO_LOSSES: dict[str, Callable[[Tensor, Comparisons], Tensor]] = {
    "sigmoid": sigmoid, "plackett_luce": plackett_luce, "softmax": softmax, "all_pairs": all_pairs,
}  # fmt: skip


def is_per_pair(loss: str) -> bool:
    """Whether the loss of DPO_LOSSES of that name has a value a pair, and not a ranking."""
    return loss == "sigmoid"


def l2wrap(loss: Tensor, max_logits: Tensor) -> Tensor:
    """`loss` unchanged in value, with RWKV-LM's L2Wrap added to its gradient, scaled by the incoming gradient.

    max_logits [rows]: each row's largest logit, differentiable. Its gradient becomes L2WRAP_FACTOR / rows * max_logit.
    """
    pull = 0.5 * L2WRAP_FACTOR * max_logits.square().mean()
    return loss + (pull - pull.detach())


def mix(loss_general: Tensor, loss_dpo: Tensor, ratio: float) -> Tensor:
    """ratio * loss_general + (1 - ratio) * loss_dpo. A part with weight 0 is left out: it may be NaN or not computed."""
    if ratio == 0:
        return loss_dpo
    if ratio == 1:
        return loss_general
    return ratio * loss_general + (1 - ratio) * loss_dpo
