"""The best held-out figure of a run: its weights are kept, and the run ends if there is no improvement for long enough."""

import json
import logging
import math
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from rwkv_dpo.training.checkpoints import Checkpoints
from rwkv_dpo.training.module import DPOModule
from rwkv_dpo.training.validation import AfterEvaluation, HeldOut

log = logging.getLogger(__name__)


class Best(AfterEvaluation):
    """Keeps rwkv-best.pth (adapter-best, state-best.pth), the weights with the best figure so far, and ends the run after `patience`
    evaluations without an improvement. Evaluations before a resumption count. Comes before the callbacks that save what a run needs to
    continue."""

    def __init__(self, metric: str, held_out: HeldOut, checkpoints: Checkpoints, keeps: bool, patience: int) -> None:
        """metric: a name in valid.jsonl; for losses, the lowest is the best. patience 0: the run is not ended early."""
        super().__init__(held_out)
        self.metric, self.checkpoints, self.keeps, self.patience = metric, checkpoints, keeps, patience
        self.sign = 1.0 if "loss" in metric else -1.0
        self.best, self.since = math.inf, 0  # evaluations since the best one

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if not self.held_out.record:
            self.best, self.since = trainer.strategy.broadcast(self._before() if trainer.is_global_zero else (math.inf, 0))
            self._end(trainer)
        super().on_train_start(trainer, module)

    @override
    def on_evaluation(self, trainer: pl.Trainer, module: DPOModule, record: dict[str, Any]) -> None:
        if self._is_better(record) and self.keeps:
            self.checkpoints.save(trainer, module, "best")
        self._end(trainer)

    def _is_better(self, record: dict[str, Any]) -> bool:
        value = record.get(self.metric)
        if value is None or self.sign * value >= self.best:
            self.since += 1
            return False
        self.best, self.since = self.sign * value, 0
        return True

    def _end(self, trainer: pl.Trainer) -> None:
        if not self.patience or self.since < self.patience:
            return
        # Lightning ends the epoch and the run after this step.
        trainer.should_stop = True
        if trainer.is_global_zero:
            log.info(
                "no better %s in %d evaluations: the run ends after step %d (--early_stop)", self.metric, self.since, trainer.global_step
            )

    def _before(self) -> tuple[float, int]:
        """Restore the state from the evaluations in valid.jsonl. If the best weights no longer exist, the next evaluation is the best."""
        folder = self.checkpoints.folder
        log_file = folder / "valid.jsonl"
        is_lost = self.keeps and not self.checkpoints.path_of("best").exists()
        if is_lost or not log_file.exists():
            return math.inf, 0
        for line in log_file.read_text().splitlines():
            self._is_better(json.loads(line))
        return self.best, self.since
