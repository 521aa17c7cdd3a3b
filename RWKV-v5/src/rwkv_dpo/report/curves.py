"""What a run's curves show: which figures belong together, made smooth and thinned so that any length of run fits a page."""

from dataclasses import dataclass, field

import numpy as np

from rwkv_dpo.report.columns import Columns

# Points of a curve: more would not be seen.
MOST = 400


@dataclass(frozen=True)
class Curve:
    """style: "line", "raw" (a faint one behind a smooth one), "points" (a line through marked points), or "band" between `values` and
    `upper`. kind: whose it is, which decides its color."""

    label: str
    kind: str
    style: str
    steps: np.ndarray
    values: np.ndarray
    upper: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps. form: of a number. is_share: from 0 to 1."""

    title: str
    about: str
    form: str
    curves: list[Curve]
    is_share: bool = False

    @property
    def steps(self) -> tuple[float, float]:
        """The first and the last."""
        return min(curve.steps[0] for curve in self.curves), max(curve.steps[-1] for curve in self.curves)

    @property
    def bounds(self) -> tuple[float, float]:
        """What the value axis shows; a few outliers among single steps may lie beyond."""
        if self.is_share:
            return -0.03, 1.03
        parts = [_usual(curve.values) if curve.style == "raw" else curve.values for curve in self.curves]
        low, high = float(min(part.min() for part in parts)), float(max(part.max() for part in parts))
        # What differs by rounding alone is one value.
        room = 0.05 * (high - low if high - low > 1e-6 * abs(high) else abs(high)) or 1.0
        return low - room, high + room


def charts(train: Columns, held_out: Columns) -> list[Chart]:
    """Those for which a run has figures, in the order of a page. train, held_out: the records of metrics.jsonl and valid.jsonl."""
    # What a run minimises is shown beside the part that it is alone only where it has two.
    is_one_part = ("loss_general" in train) != ("loss_dpo" in train)
    drawn = [
        Chart("Loss", "what the run minimises", ".4f", [] if is_one_part else _steps(train, "loss")),
        Chart("Preference loss", "of pairs", ".4f", _steps(train, "loss_dpo") + _points(held_out, "loss_dpo")),
        Chart("Corpus loss", "nats per token", ".4f", _steps(train, "loss_general") + _points(held_out, "corpus_loss")),
        Chart(
            "Accuracy", "share of pairs whose chosen answer has the larger reward; the band holds the held-out one with 95 % confidence",
            ".3f",
            [*_band(held_out), *_steps(train, "rewards/accuracies")[-1:],
             *_points(held_out, "rewards/accuracies", where=_has_rewards(held_out))],
            is_share=True,
        ),
        Chart(
            "Margin", "reward of the chosen answer less that of the rejected one", ".3f",
            _steps(train, "rewards/margins") + _points(held_out, "rewards/margins"),
        ),
        drift(train, held_out),
        Chart(
            "Length", "tokens of the held-out answers that the model prefers, and of the chosen and rejected ones", ".1f",
            [curve for name in ("preferred", "chosen", "rejected") for curve in _points(held_out, f"lengths/{name}", name, name)],
        ),
        Chart("Learning rate", "", ".3g", _exact(train, "lr")),
        Chart("Gradient norm", "before clipping", ".3g", _steps(train, "grad_norm")),
        Chart("Throughput", "tokens per second", ",.0f", _steps(train, "tokens_per_s")),
        Chart("Peak memory", "GB, of the first process", ".2f", _exact(train, "peak_memory_gb")),
    ]  # fmt: skip
    return [chart for chart in drawn if chart.curves]


def drift(train: Columns, held_out: Columns) -> Chart:
    """How log-probabilities of answers have changed: since the first evaluation, or without two of them from the reference's."""
    curves, names = [], ("chosen", "rejected")
    if len(held_out) > 1:
        for name in names:
            curves += _points(held_out, f"logps/{name}", name, name, from_first=True)
        return Chart("Change of log-probabilities", "nats, of held-out answers, since the first evaluation", "+.3g", curves)
    for name in names:
        curves += _curves(name, name, train.steps, train[f"logps/{name}"] - train[f"ref_logps/{name}"])[-1:]
    return Chart("Change of log-probabilities", "nats, of the answers in a step, from the reference's", "+.3g", curves)


def _steps(train: Columns, name: str) -> list[Curve]:
    return _curves("training", "train", train.steps, train[name])


def _exact(train: Columns, name: str) -> list[Curve]:
    """Of a figure without noise."""
    known = np.isfinite(train[name])
    return [Curve("training", "train", "line", *means(train.steps[known], train[name][known]))] if known.any() else []


def _curves(label: str, kind: str, steps: np.ndarray, values: np.ndarray) -> list[Curve]:
    """The single steps and a smooth curve; nothing without numbers."""
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if not len(steps):
        return []
    raw = Curve(f"{label}, single steps", kind, "raw", *extremes(steps, values))
    # One step in a thousand may be millions of times the others, and would be seen in the mean of all around it.
    return [raw, Curve(label, kind, "line", *means(steps, smoothed(np.clip(values, *_usual(values)))))]


def _points(
    held_out: Columns, name: str, label: str = "held-out", kind: str = "held-out", from_first: bool = False,
    where: np.ndarray | bool = True,
) -> list[Curve]:  # fmt: skip
    values = held_out[name]
    known = np.isfinite(values) & where
    if not known.any():
        return []
    values = values[known]
    return [Curve(label, kind, "points", *means(held_out.steps[known], values - values[0] * from_first))]


def _band(held_out: Columns) -> list[Curve]:
    low, high = held_out["rewards/accuracies_95/low"], held_out["rewards/accuracies_95/high"]
    known = np.isfinite(low) & np.isfinite(high) & _has_rewards(held_out)
    if known.sum() < 2:
        return []
    steps, lows = means(held_out.steps[known], low[known])
    return [Curve("95 %", "held-out", "band", steps, lows, means(held_out.steps[known], high[known])[1])]


def _has_rewards(held_out: Columns) -> np.ndarray:
    """Whether some reward differs in an evaluation: a model that is its own reference prefers neither answer, of which a strict
    comparison makes an accuracy of 0."""
    return (held_out["rewards/accuracies"] > 0) | (held_out["rewards/margins"] != 0)


def _usual(values: np.ndarray) -> np.ndarray:
    """Between which all but a hundredth at either end lie; all of fewer than a hundred."""
    return np.array([np.percentile(values, 1, method="lower"), np.percentile(values, 99, method="higher")])


def smoothed(values: np.ndarray) -> np.ndarray:
    """Each value's mean with those around it, a twentieth of all; at both ends with those that there are.

    >>> smoothed(np.array([1.0, 2.0, 6.0])).tolist()
    [1.5, 3.0, 4.0]
    """
    n, places, reach = len(values), np.arange(len(values)), max(len(values) // 40, 1)
    first, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, n)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[end] - sums[first]) / (end - first)


def means(steps: np.ndarray, values: np.ndarray, most: int = MOST) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points: the mean of each stretch of values, at its mean step. The first and the last stay as they are."""
    if len(steps) <= most:
        return steps, values
    edges = _edges(len(steps), most)
    n = np.diff(np.append(edges, len(steps)))
    thin_steps, thin = (np.add.reduceat(column, edges) / n for column in (steps, values))
    for i in (0, -1):
        thin_steps[i], thin[i] = steps[i], values[i]
    return thin_steps, thin


def extremes(steps: np.ndarray, values: np.ndarray, most: int = MOST) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points: of each stretch the lowest and the highest value, both at its first step."""
    if len(steps) <= most:
        return steps, values
    edges = _edges(len(steps), most // 2)
    lows, highs = np.minimum.reduceat(values, edges), np.maximum.reduceat(values, edges)
    return np.repeat(steps[edges], 2), np.stack([lows, highs], axis=1).ravel()


def _edges(n: int, most: int) -> np.ndarray:
    """Where each of so many stretches of n begins."""
    return np.arange(most) * n // most
