"""What a run measures on held-out pairs."""

import logging
import math
import random
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
    """Loss, accuracy and margins on held-out pairs at the end of every epoch, and, where every is above 0, before the first optimizer
    step and after every so many: a printed line and a line of valid.jsonl each time."""

    def __init__(
        self, pairs: PairSet, mixture: Mixture, batch_tokens: int, length: RunLength, every: int, folder: Path, halt: Halt, shows_bar: bool
    ) -> None:
        """batch_tokens: scored at once."""
        self.pairs, self.mixture, self.batch_tokens, self.length, self.every = pairs, mixture, batch_tokens, length, every
        self.folder, self.halt, self.shows_bar = folder, halt, shows_bar
        self.record: dict[str, Any] = {}  # of the last evaluation
        self.step = 0  # optimizer steps of this run until then, or until it was resumed

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        self.step = trainer.global_step
        if self.every and not trainer.global_step:
            self._evaluate(trainer, module)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, module: DPOModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self.every and trainer.global_step != self.step and not trainer.global_step % self.every:
            self._evaluate(trainer, module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if self.step != trainer.global_step or not self.record:
            self._evaluate(trainer, module)

    def _evaluate(self, trainer: pl.Trainer, module: DPOModule) -> None:
        length, shows = self.length, self.shows_bar and trainer.is_global_zero
        self.step = trainer.global_step
        module.model.eval()
        with tqdm(total=len(self.pairs), unit="pair", desc="held-out", leave=False, disable=None if shows else True) as bar:
            metrics = evaluate_pairs(module.model, self.pairs, self.mixture, self.batch_tokens, bar.update)
        module.model.train()
        epoch = length.epoch_begin + trainer.current_epoch
        step = length.epoch_begin * length.steps_per_epoch + trainer.global_step
        figures: dict[str, Any] = {name: finite(value) for name, value in metrics.items()}
        figures["rewards/accuracies_95"] = interval(metrics["rewards/accuracies"], len(self.pairs))
        self.record = {"epoch": epoch, "step": step, "pairs": len(self.pairs), **figures}
        if not trainer.is_global_zero:
            return
        self.halt.append(self.folder / "valid.jsonl", as_json(self.record) + "\n")
        log.info(
            "epoch %d, step %d, %d held-out pairs: DPO loss %.4f, accuracy %.3f (%.3f to %.3f), margin %.4f",
            epoch, step, len(self.pairs), metrics["loss_dpo"], metrics["rewards/accuracies"], *figures["rewards/accuracies_95"],
            metrics["rewards/margins"],
        )  # fmt: skip


def drawn(pairs: PairSet, n: int, seed: int) -> PairSet:
    """n of the pairs, or all of them for 0 or where they are fewer."""
    if not 0 < n < len(pairs):
        return pairs
    return pairs.select(sorted(random.Random(seed).sample(range(len(pairs)), n)))


def interval(share: float, n: int) -> list[float]:
    """Where the share of all lies with 95 % confidence when it is this one among n that were drawn (Wilson 1927).

    >>> [round(bound, 3) for bound in interval(0.5, 100)]
    [0.404, 0.596]
    """
    z = 1.959964
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return [(middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)]
