"""The contents of metrics.jsonl and valid.jsonl, for programs that draw curves, under the same names in all of them."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from rwkv_dpo.report.columns import flat
from rwkv_dpo.training.metrics import MetricsLog
from rwkv_dpo.training.module import DPOModule
from rwkv_dpo.training.validation import AfterEvaluation, HeldOut


def tracked(record: Mapping[str, Any], is_held_out: bool = False) -> dict[str, float]:
    """The numbers of a record, by the names that TRL gives them: those of an evaluation begin with eval_, and its loss is eval_loss.

    >>> tracked({"step": 4, "loss_dpo": 0.5, "rewards/margins": None, "rewards/accuracies_95": [0.25, 0.75]}, is_held_out=True)
    {'step': 4, 'eval_loss': 0.5, 'eval_rewards/accuracies_95/low': 0.25, 'eval_rewards/accuracies_95/high': 0.75}
    """
    numbers = flat(record)
    if not is_held_out:
        return numbers
    own = {"step": "step", "epoch": "epoch", "loss_dpo": "eval_loss"}
    return {own.get(name, f"eval_{name}"): value for name, value in numbers.items()}


class Tracker(AfterEvaluation):
    """Passes on the record of metrics.jsonl at every step, and every record of valid.jsonl. Comes after the callbacks that make these
    records."""

    def __init__(self, metrics: MetricsLog, held_out: HeldOut) -> None:
        super().__init__(held_out)
        self.metrics = metrics

    def take(self, numbers: dict[str, float]) -> None:
        """On every rank. numbers: those of a step, which is among them, or of an evaluation after it."""
        raise NotImplementedError

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, module: DPOModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self.metrics.record:
            self.take(tracked(self.metrics.record))
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    @override
    def on_evaluation(self, trainer: pl.Trainer, module: DPOModule, record: dict[str, Any]) -> None:
        self.take(tracked(record, is_held_out=True))
