"""What a run saves: the callbacks that write its weights."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from typing_extensions import override

from rwkv_dpo.files.hashed import link_hashed
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.optimizer.length import RunLength
from rwkv_dpo.run_folder.contents import save_end, saved_name
from rwkv_dpo.run_folder.identity import Identity
from rwkv_dpo.training.guard import not_finite
from rwkv_dpo.training.halt import Halted
from rwkv_dpo.training.metrics import MetricsLog
from rwkv_dpo.training.module import DPOModule
from rwkv_dpo.tuning.tuning import Tuning


class Checkpoints(pl.Callback):
    """rwkv-{epoch}.pth every epoch_save epochs and after the last, rwkv-final.pth at the end, rwkv-last-good.pth if too many bad steps end
    the run: fp32, official names. With --peft, only what it trains: adapter-{epoch} or state-{epoch}.pth. A file next to the final one
    records which run it is the result of. Non-finite weights are never saved; they end the run."""

    def __init__(
        self, folder: Path, epoch_save: int, max_bad_steps: int, length: RunLength, peft: str, metrics: MetricsLog, tuning: Tuning | None,
        identity: Identity,
    ) -> None:  # fmt: skip
        self.folder, self.epoch_save, self.max_bad_steps, self.length = folder, epoch_save, max_bad_steps, length
        self.peft, self.metrics, self.tuning, self.identity = peft, metrics, tuning, identity
        self.halt = metrics.halt
        self.newest, self.saved_at = Path(), -1  # what was saved last, and at which step
        self.written: list[Path] = []

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, module: DPOModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        n, bad_step = self.metrics.bad_in_a_row, self.metrics.bad_step
        if n >= self.max_bad_steps:
            path = self.save(trainer, module, "last-good")
            raise Halted("", f"stopped at {bad_step}, after {n} such steps in a row (--max_bad_steps); weights before them: {path}")

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        epoch = trainer.current_epoch
        is_last = epoch + 1 >= self.length.n_epochs
        if is_last or (self.epoch_save and epoch % self.epoch_save == 0):
            self.save(trainer, module, str(self.length.epoch_begin + epoch))

    @override
    def on_train_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        path = self.save(trainer, module, "final")
        self.halt.write(trainer, lambda: save_end(path, self.identity, trainer.global_step))

    def path_of(self, label: str) -> Path:
        """The path of the weights with that label."""
        return self.folder / saved_name(self.peft, label)

    def save(self, trainer: pl.Trainer, module: DPOModule, label: str) -> Path:
        """Write the trained weights under that label; every rank has to call it. Returns the path."""
        weights, path = full_weights(trainer, module), self.path_of(label)
        if name := not_finite(weights):
            bad_step = f" (bad steps, the last of them {self.metrics.bad_step})" if self.metrics.bad_step else ""
            self.halt.fault = f"{path}: not written: {name} is not finite{bad_step}"
            self.halt.check(True)

        def write() -> None:
            if self.tuning is not None:
                self.tuning.save(weights, self.folder, label)
            elif trainer.global_step != self.saved_at or not link_hashed(self.newest, path):
                save_weights(weights, path)
            self.newest, self.saved_at = path, trainer.global_step
            if path not in self.written:
                self.written.append(path)

        self.halt.write(trainer, write)
        return path


def full_weights(trainer: pl.Trainer, module: DPOModule) -> dict[str, torch.Tensor]:
    """Every trained parameter in fp32. With DeepSpeed they are gathered from the ranks, so all ranks have to call this. They are moved to
    the CPU one by one, because a device may have room for its part of the model only."""
    parameters = [(name, parameter) for name, parameter in module.model.named_parameters() if parameter.requires_grad]
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return {name: parameter.detach() for name, parameter in parameters}
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in parameters}
