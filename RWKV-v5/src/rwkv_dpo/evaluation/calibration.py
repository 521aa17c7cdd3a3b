"""Whether a model is as often right as its rewards say: sigmoid(margin) is the probability that it gives to a preference."""

from typing import Any

import numpy as np

_EDGES = np.linspace(0.5, 1.0, 11)


def calibration(margins: np.ndarray) -> dict[str, Any] | None:
    """Of reward margins [n], chosen minus rejected, at least one; None when one of them is no number.

    Pairs are all written chosen answer first, so that their order says nothing: confidence is the probability of the answer that the
    model prefers, sigmoid(|margin|), and it is right when that is the chosen one (a margin of 0 prefers neither, and counts half).

    {"bins": [{"from": 0.5, "to": 0.55, "pairs": 12, "confidence": 0.53, "accuracy": 0.58}, ...], "ece": 0.04, "brier": 0.21,
    "log_loss": 0.6}: ten bins of confidence, means of empty ones None; the expected calibration error, |accuracy - confidence| over bins
    by their pairs (Guo et al. 2017, arXiv:1706.04599); Brier score and log loss (nats) of the probability of the chosen answer.
    """
    if not np.isfinite(margins).all():
        return None
    wrong = _sigmoid(-margins)
    confidence, accuracy = _sigmoid(np.abs(margins)), (np.sign(margins) + 1) / 2
    places = np.clip(np.searchsorted(_EDGES, confidence, side="right") - 1, 0, len(_EDGES) - 2)
    bins: list[dict[str, Any]] = []
    for i, (low, high) in enumerate(zip(_EDGES.tolist(), _EDGES[1:].tolist(), strict=False)):
        own = places == i
        means = (float(x[own].mean()) if own.any() else None for x in (confidence, accuracy))
        bins.append({"from": low, "to": high, "pairs": int(own.sum()), **dict(zip(("confidence", "accuracy"), means, strict=True))})
    gaps = [one["pairs"] * abs(one["accuracy"] - one["confidence"]) for one in bins if one["pairs"]]
    return {
        "bins": bins,
        "ece": sum(gaps) / len(margins),
        "brier": float((wrong**2).mean()),
        "log_loss": float(np.logaddexp(0, -margins).mean()),
    }


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # Not by exp(-x), which overflows.
    return np.exp(-np.logaddexp(0, -x))
