"""Records of a run, one figure beside the other: a column of numbers for each name, which a hundred thousand steps may fill."""

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


class Columns:
    """Of records with a step each, in the order in which they were written. NaN stands for what a record lacks.

    >>> columns = Columns([{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6, "rewards/accuracies_95": [0.4, 0.6]}])
    >>> columns["loss"].tolist(), columns["rewards/accuracies_95/high"].tolist()
    ([0.7, 0.6], [nan, 0.6])
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._steps = array("d")
        self._columns: dict[str, array] = {}
        for record in records:
            self.add(record)

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, name: str) -> bool:
        """Whether any record has a number of that name."""
        return bool(np.isfinite(self[name]).any())

    def __getitem__(self, name: str) -> np.ndarray:
        """float64 [records]; all NaN for a name that no record has."""
        return np.array(self._columns[name]) if name in self._columns else np.full(len(self), np.nan)

    @property
    def steps(self) -> np.ndarray:
        """float64 [records], increasing."""
        return np.array(self._steps)

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes a record, unless it has no step. One of a step that was there before replaces what followed: a run that was killed has
        done those steps again."""
        step = record.get("step")
        if not isinstance(step, int | float):
            return
        self._cut(bisect_left(self._steps, step))
        for name, value in flat(record).items():
            if name not in self._columns:
                self._columns[name] = array("d", [np.nan]) * len(self)
            self._columns[name].append(value)
        self._steps.append(step)
        for column in self._columns.values():
            if len(column) < len(self):
                column.append(np.nan)

    def _cut(self, n: int) -> None:
        if n < len(self):
            for column in (self._steps, *self._columns.values()):
                del column[n:]


def flat(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record; both ends of an interval under names of their own. What is no number is left out."""
    parts: dict[str, Any] = {}
    for name, value in record.items():
        is_interval = isinstance(value, list) and len(value) == 2
        parts |= {f"{name}/low": value[0], f"{name}/high": value[1]} if is_interval else {name: value}
    return {name: value for name, value in parts.items() if isinstance(value, int | float)}
