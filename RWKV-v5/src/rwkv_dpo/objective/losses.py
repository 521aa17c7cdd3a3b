"""The losses that there are, how several of them are one, and how pairs and corpus are. Everything is fp32 (or float64) and
differentiable."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from rwkv_dpo.batches.micro_batch import Shares
from rwkv_dpo.objective import pair_losses, ranking_losses
from rwkv_dpo.objective.preferences import Loss, Options, Preferences
from rwkv_dpo.objective.settings import AOT, LOSSES_OF_PAIRS, LOSSES_OF_RANKINGS, WITHOUT_REFERENCE, ObjectiveSettings
from rwkv_dpo.objective.whole_batch import across_ranks
from rwkv_dpo.settings.fields import flags_of

# RWKV-LM's pull of each row's largest logit towards 0, which keeps logits in the range of bf16.
L2WRAP_FACTOR = 1e-4
LOSSES: Mapping[str, Loss] = {
    **{name: getattr(pair_losses, name) for name in LOSSES_OF_PAIRS},
    **{name: getattr(ranking_losses, name) for name in LOSSES_OF_RANKINGS},
}


@dataclass(frozen=True)
class Mixture:
    """Losses by name, the weight of each in their sum, and their options."""

    weights: Mapping[str, float]
    options: Options

    @property
    def uses_reference(self) -> bool:
        """Whether any of them does."""
        return not set(self.weights) <= set(WITHOUT_REFERENCE)


def mixture_of(settings: ObjectiveSettings) -> Mixture:
    """What a run minimises of its pairs."""
    options = Options(
        settings.dpo_beta, settings.dpo_label_smoothing, settings.simpo_gamma, settings.dpop_lambda, settings.dpo_f_divergence,
        settings.dpo_f_alpha, settings.dpo_ld_alpha,
    )  # fmt: skip
    return Mixture(dict(zip(settings.losses, settings.loss_weights, strict=True)), options)


def mixture_of_flags(values: Mapping[str, Any]) -> Mixture:
    """The same, of a run's flags by name, some of which it may not have known."""
    return mixture_of(ObjectiveSettings(**{name: values[name] for name in flags_of(ObjectiveSettings) if name in values}))


def dpo(beta: float) -> Mixture:
    """DPO alone."""
    return Mixture({"sigmoid": 1.0}, Options(beta))


def preference_loss(given: Preferences, mixture: Mixture, shares: Shares | None = None) -> Tensor:
    """The weighted sum of the losses' means (0-d). shares: of a micro-batch in its optimizer step, of whose pairs each rank has a part, and
    losses over a batch see all of them; None: the pairs are looked at by themselves."""
    total = given.logps.new_zeros(())
    for name, weight in mixture.weights.items():
        mean_of = partial(_mean, LOSSES[name], options=mixture.options)
        if shares is None:
            loss = mean_of(given)
        elif name in AOT:
            loss = across_ranks(given, mean_of)
        else:
            loss = mean_of(given, shares=shares.rankings if name in LOSSES_OF_RANKINGS else shares.pairs)
        total = total + weight * loss
    return total


def _mean(loss: Loss, given: Preferences, options: Options, shares: Tensor | None = None) -> Tensor:
    values = loss(given, options)
    for factors in (given.weights, shares):
        values = values if factors is None else factors.to(values.dtype) * values
    return values.mean()


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
