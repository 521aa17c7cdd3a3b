"""The losses, as pure functions of log-probabilities. Everything here is fp32 (or float64) and differentiable."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

# RWKV-LM's pull of each row's largest logit towards 0, which keeps logits in the range of bf16.
L2WRAP_FACTOR = 1e-4


class DPOTerms(NamedTuple):
    """The loss of each pair, and the rewards that it compares."""

    losses: Tensor  # [pairs]
    chosen_rewards: Tensor  # [pairs] beta * (logp - ref_logp), as TRL names it; no gradient
    rejected_rewards: Tensor  # [pairs]


def dpo_loss(logps: Tensor, ref_logps: Tensor, beta: float) -> DPOTerms:
    """The sigmoid loss of Rafailov et al. 2023 (arXiv:2305.18290, equation 7), one value a pair.

    logps, ref_logps [pairs, 2]: sums of log-probabilities over the tokens of the chosen and the rejected answer, in nats, under
    the policy and the reference.
    """
    chosen_rewards, rejected_rewards = (beta * (logps - ref_logps)).unbind(1)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return DPOTerms(losses, chosen_rewards.detach(), rejected_rewards.detach())


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
