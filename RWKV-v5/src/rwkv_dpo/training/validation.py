"""What a run measures on held-out pairs."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from tqdm import tqdm
from typing_extensions import override

from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.evaluation.scoring import evaluate_pairs
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.objective.losses import Mixture
from rwkv_dpo.optimizer.length import RunLength
from rwkv_dpo.training.halt import Halt
from rwkv_dpo.training.metrics import finite
from rwkv_dpo.training.module import DPOModule

log = logging.getLogger(__name__)


class ValidPairs(pl.Callback):
    """Loss, accuracy and margins on held-out pairs at the end of every epoch: a printed line and a line of valid.jsonl."""

    def __init__(
        self, pairs: PairSet, mixture: Mixture, batch_tokens: int, length: RunLength, folder: Path, halt: Halt, shows_bar: bool
    ) -> None:
        """batch_tokens: scored at once."""
        self.pairs, self.mixture, self.batch_tokens, self.length = pairs, mixture, batch_tokens, length
        self.folder, self.halt, self.shows_bar = folder, halt, shows_bar
        self.record: dict[str, Any] = {}  # of the last epoch

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        length, shows = self.length, self.shows_bar and trainer.is_global_zero
        module.model.eval()
        with tqdm(total=len(self.pairs), unit="pair", desc="held-out", leave=False, disable=None if shows else True) as bar:
            metrics = evaluate_pairs(module.model, self.pairs, self.mixture, self.batch_tokens, bar.update)
        module.model.train()
        epoch = length.epoch_begin + trainer.current_epoch
        step = length.epoch_begin * length.steps_per_epoch + trainer.global_step
        figures = {name: finite(value) for name, value in metrics.items()}
        self.record = {"epoch": epoch, "step": step, "pairs": len(self.pairs), **figures}
        if not trainer.is_global_zero:
            return
        self.halt.append(self.folder / "valid.jsonl", as_json(self.record) + "\n")
        log.info(
            "epoch %d, %d held-out pairs: DPO loss %.4f, accuracy %.3f, margin %.4f",
            epoch, len(self.pairs), metrics["loss_dpo"], metrics["rewards/accuracies"], metrics["rewards/margins"],
        )  # fmt: skip
