"""--tensorboard: metrics as TensorBoard event files; its package is optional."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from rwkv_dpo.base.libraries import check_package
from rwkv_dpo.optimizer.length import RunLength
from rwkv_dpo.training.metrics import MetricsLog
from rwkv_dpo.training.module import DPOModule
from rwkv_dpo.training.trackers import Tracker
from rwkv_dpo.training.validation import HeldOut

log = logging.getLogger(__name__)
# Inside the run folder.
TENSORBOARD = "tensorboard"


def check_tensorboard(tensorboard: int) -> None:
    """Refuse --tensorboard 1 if its package is missing. Raises InputError."""
    if tensorboard:
        check_package("tensorboard", "--tensorboard 1", "metrics.jsonl has the same figures")


class TensorBoardLog(Tracker):
    """Event files in the run folder, from rank 0. A resumed run removes the events of the steps that it repeats. A failure to write is
    reported once and doesn't end the run."""

    def __init__(self, folder: Path, length: RunLength, metrics: MetricsLog, held_out: HeldOut) -> None:
        super().__init__(metrics, held_out)
        self.folder, self.length = folder / TENSORBOARD, length
        self.writer: Any = None

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if trainer.is_global_zero:
            from torch.utils.tensorboard import SummaryWriter

            next_step = self.length.epoch_begin * self.length.steps_per_epoch + trainer.global_step + 1
            try:
                self.writer = SummaryWriter(str(self.folder), purge_step=next_step if self.folder.exists() else None)
            except OSError as error:
                self._give_up(error)
        super().on_train_start(trainer, module)

    @override
    def take(self, numbers: dict[str, float]) -> None:
        if self.writer is not None:
            try:
                for name, value in numbers.items():
                    if name != "step":
                        self.writer.add_scalar(name, value, int(numbers["step"]))
            except OSError as error:
                self._give_up(error)

    @override
    def on_fit_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if self.writer is not None:
            try:
                self.writer.close()
            except OSError as error:
                self._give_up(error)
        self.writer = None

    @override
    def on_exception(self, trainer: pl.Trainer, module: DPOModule, exception: BaseException) -> None:  # type: ignore[override]
        self.on_fit_end(trainer, module)

    def _give_up(self, error: OSError) -> None:
        self.writer = None
        log.warning("%s: %s; the run continues without it", self.folder, error.strerror or error)
