"""Whether a model has learned more than length: accuracy by how much longer the chosen answer is than the rejected one."""

from collections.abc import Mapping
from typing import Any

import numpy as np

# Of (chosen - rejected) / the longer of both, in tokens: half as long or less, shorter, within a tenth, longer, twice as long or more.
_BOUNDS = (-0.5, -0.1, 0.1, 0.5)
GROUPS = ("much shorter", "shorter", "about equal", "longer", "much longer")


def by_length(lengths: np.ndarray, margins: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """lengths: [n, 2], tokens of the chosen and the rejected answer of each pair, at least one; margins: by name, [n] each, above 0 where
    the chosen answer is preferred; all 0 prefer neither.

    {"groups": [{"chosen_is": "much shorter", "pairs": 12, "accuracies": {"logps": 0.75}}, ...], "longer_is_chosen": 0.6, "correlations":
    {"logps": 0.1}}: how often preferring the longer answer would be right (answers of equal length count half), and Pearson's correlation
    of each margin with chosen - rejected tokens. None where there is no such number.
    """
    difference = lengths[:, 0] - lengths[:, 1]
    places = _groups(difference / np.maximum(lengths.max(axis=1), 1))
    groups = []
    for i, name in enumerate(GROUPS):
        own = places == i
        accuracies = {key: float((margin[own] > 0).mean()) if own.any() and margin.any() else None for key, margin in margins.items()}
        groups.append({"chosen_is": name, "pairs": int(own.sum()), "accuracies": accuracies})
    return {
        "groups": groups,
        "longer_is_chosen": float(((np.sign(difference) + 1) / 2).mean()),
        "correlations": {key: _correlation(difference, margin) for key, margin in margins.items()},
    }


def _groups(relative: np.ndarray) -> np.ndarray:
    """The place of each in GROUPS; a bound belongs to the outer group, those of "about equal" to that."""
    low, less, more, high = _BOUNDS
    return np.select([relative <= low, relative < less, relative <= more, relative < high], [0, 1, 2, 3], 4)


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if not np.isfinite(b).all():
        return None
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if size else None
