"""Known ways in which preference training goes wrong, told by a run's records in plain words with the flags to turn. Signs err; a person
decides."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rwkv_dpo.report.columns import Columns

# Steps whose mean stands for a stretch of training: a tenth of all, and so many at least.
LEAST_STEPS = 20
# Log-probabilities fall steeply from these shares on, and from as many nats; what else counts as much.
STEEP, STEEP_NATS, CORPUS_RISE, LONGER, GAP = 0.1, 5.0, 0.1, 0.2, 0.15
# The margin at which sigma is 0.99: a pair's gradient is then a hundredth of what it was.
SATURATED = math.log(0.99 / 0.01)
_ALMOST_ALL = 0.98
# Losses whose gradient of a pair vanishes as its margin grows.
_OF_SIGMA = {"sigmoid", "cdpo", "robust", "exo_pair", "discopop", "dpop", "aot", "aot_unpaired", "plackett_luce", "softmax", "all_pairs"}


def run_doubts(train: Columns, held_out: Columns, flags: Mapping[str, Any]) -> dict[str, str]:
    """By the name of each failure that shows, a line. train, held_out: the records of metrics.jsonl and valid.jsonl; flags: the run's."""
    told = {name: sign(train, held_out, flags) for name, sign in _SIGNS.items()}
    return {name: line for name, line in told.items() if line}


def _falling(train: Columns, held_out: Columns, flags: Mapping[str, Any]) -> str:
    ends = {name: _ends(train, held_out, f"logps/{name}") for name in ("chosen", "rejected")}
    accuracy = _ends(train, held_out, "rewards/accuracies")
    if accuracy is None or accuracy[1] <= accuracy[0] or not all(end and _is_steep(*end) for end in ends.values()):
        return ""
    told = " and ".join(f"those of {name} answers from {end[0]:.1f} to {end[1]:.1f}" for name, end in ends.items() if end)
    return (
        f"accuracy rises from {accuracy[0]:.2f} to {accuracy[1]:.2f} while both log-probabilities fall, {told} nats: the model learns to "
        "prefer by unlearning both. Lower --lr_init, raise --dpo_beta, or take --dpo_loss dpop or sigmoid,sft"
    )


def _is_steep(first: float, last: float) -> bool:
    return first - last > max(STEEP * abs(first), STEEP_NATS)


def _forgetting(train: Columns, held_out: Columns, flags: Mapping[str, Any]) -> str:
    end = _ends(Columns(), held_out, "corpus_loss") or _ends(train, Columns(), "loss_general")
    if end is None or end[1] <= (1 + CORPUS_RISE) * end[0]:
        return ""
    return (
        f"the corpus loss has risen by {end[1] / end[0] - 1:.0%}, from {end[0]:.3f} to {end[1]:.3f} nats per token: the model unlearns the "
        "corpus. Raise --dpo_general_corpus_ratio, or lower --lr_init"
    )


def _saturated(train: Columns, held_out: Columns, flags: Mapping[str, Any]) -> str:
    losses = {name.strip() for name in str(flags.get("dpo_loss", "sigmoid")).split(",")}
    margin, accuracy = _late(train["rewards/margins"]), _late(train["rewards/accuracies"])
    if not losses & _OF_SIGMA or margin is None or accuracy is None or margin <= SATURATED or accuracy < _ALMOST_ALL:
        return ""
    return (
        f"the margins of training pairs are {margin:.1f} on average, beta included: at {SATURATED:.1f} a pair is preferred with 0.99, and "
        "there is little left to learn from it. Train fewer epochs (--epoch_count), or raise --dpo_beta, which stops nearer to the "
        "reference"
    )


def _lengthening(train: Columns, held_out: Columns, flags: Mapping[str, Any]) -> str:
    shares = held_out["lengths/preferred"] / held_out["lengths/chosen"]
    shares = shares[np.isfinite(shares)]
    if len(shares) < 2 or shares[-1] <= (1 + LONGER) * shares[0]:
        return ""
    return (
        f"the held-out answers that the model prefers grow longer: from {shares[0]:.2f} to {shares[-1]:.2f} times the length of the chosen "
        "ones. Length may be what it learns; --dpo_loss sigmoid_norm and simpo count log-probabilities a token"
    )


def _overfitting(train: Columns, held_out: Columns, flags: Mapping[str, Any]) -> str:
    known = held_out["rewards/accuracies"][np.isfinite(held_out["rewards/accuracies"])]
    high = held_out["rewards/accuracies_95/high"]
    seen = _late(train["rewards/accuracies"])
    # What chance explains of a small held-out set is no sign.
    if seen is None or not len(known) or seen - known[-1] <= GAP or seen <= np.nan_to_num(high[-1]):
        return ""
    return (
        f"accuracy is {seen:.2f} on training pairs and {known[-1]:.2f} on held-out ones: the model learns pairs by heart. Train fewer "
        "epochs (--epoch_count) or lower --lr_init; --keep_best loss_dpo keeps the weights of the best evaluation"
    )


_SIGNS: dict[str, Callable[[Columns, Columns, Mapping[str, Any]], str]] = {
    "falling": _falling, "forgetting": _forgetting, "saturated": _saturated, "lengthening": _lengthening, "overfitting": _overfitting,
}  # fmt: skip


def _ends(train: Columns, held_out: Columns, name: str) -> tuple[float, float] | None:
    """A figure of the first and the last evaluation, or without two of them of the first and the last steps; None without either."""
    values = held_out[name][np.isfinite(held_out[name])]
    if len(values) > 1:
        return float(values[0]), float(values[-1])
    early, late = _late(train[name][::-1]), _late(train[name])
    return None if early is None or late is None else (early, late)


def _late(values: np.ndarray) -> float | None:
    """The mean of the last ones; None while those could be the first ones, too."""
    values = values[np.isfinite(values)]
    n = max(len(values) // 10, LEAST_STEPS)
    return float(values[-n:].mean()) if len(values) >= 2 * n else None
