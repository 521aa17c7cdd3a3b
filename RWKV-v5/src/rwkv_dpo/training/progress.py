"""What a run prints: its progress, and at its end what it has made and what to do with it."""

import contextlib
import datetime
import json
import logging
import time
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from rwkv_dpo.base.progress import Progress
from rwkv_dpo.training.checkpoints import Checkpoints
from rwkv_dpo.training.metrics import MetricsLog
from rwkv_dpo.training.module import DPOModule
from rwkv_dpo.training.run_report import REPORT

log = logging.getLogger(__name__)

# The fields of a step's record that are shown.
_SHOWN = {
    "loss": ("loss", ".4f"), "rewards/accuracies": ("accuracy", ".2f"), "rewards/margins": ("margin", ".3f"),
    "tokens_per_s": ("tok/s", ",.0f"),
}  # fmt: skip


class RunBar(pl.Callback):
    """Progress in optimizer steps, including those before a resumption; the rate is that of this process, the remaining time covers all
    steps left. On rank 0. Comes after the callback whose records it shows."""

    def __init__(self, total_steps: int, every_s: float, metrics: MetricsLog) -> None:
        """every_s: seconds between two lines, if there is no terminal for a bar."""
        self.total_steps, self.every_s, self.metrics = total_steps, every_s, metrics
        self.shown = contextlib.ExitStack()
        self.progress: Progress | None = None
        self.figures: dict[str, str] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if trainer.is_global_zero:
            progress = Progress(self.total_steps, "step", "training", self.every_s, done=trainer.global_step, leave=True)
            self.progress = self.shown.enter_context(progress)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, module: DPOModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        record = self.metrics.record
        if self.progress is not None and record:
            self.figures = {short: format(record[name], form) for name, (short, form) in _SHOWN.items() if record.get(name) is not None}
            self.progress.update(1, self.figures)

    @override
    def on_train_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if self.progress is not None:
            self.progress.tell(self.figures)
        self.shown.close()

    @override
    def on_exception(self, trainer: pl.Trainer, module: DPOModule, exception: BaseException) -> None:  # type: ignore[override]
        self.on_train_end(trainer, module)


class Summary(pl.Callback):
    """The last lines of a run that ends normally: time, files, best and last held-out figures, and the next command. Comes last."""

    def __init__(self, folder: Path, checkpoints: Checkpoints, next_commands: list[str]) -> None:
        self.folder, self.checkpoints, self.next_commands = folder, checkpoints, next_commands

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        self.first, self.clock = trainer.global_step + 1, time.perf_counter()

    @override
    def on_train_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        took = datetime.timedelta(seconds=round(time.perf_counter() - self.clock))
        log.info("steps %d to %d in %s", self.first, trainer.global_step, took)
        logs = [path for name in ("metrics.jsonl", "valid.jsonl") if (path := self.folder / name).exists()]
        log.info("wrote %s", ", ".join(map(str, [*_some(self.checkpoints.written), *logs])))
        if (page := self.folder / REPORT).exists():
            log.info("%s shows the run", page)
        if held_out := best_and_last(self.folder / "valid.jsonl"):
            log.info("%s", held_out)
        for command in self.next_commands:
            log.info("next: %s", command)


def _some(paths: list[Path]) -> list[Path]:
    return paths if len(paths) <= 4 else [*paths[:2], Path("..."), *paths[-2:]]


def best_and_last(valid: Path) -> str:
    """The held-out figures of the best evaluation, by the loss of pairs or of the corpus, and of the last one; "" if there are none."""
    records = [json.loads(line) for line in valid.read_text().splitlines()] if valid.exists() else []
    for loss, data in (("loss_dpo", "pairs"), ("corpus_loss", "corpus")):
        known = [record for record in records if record.get(loss) is not None]
        if not known:
            continue
        best, last = min(known, key=itemgetter(loss)), known[-1]
        if best is last:
            return f"held-out {data}: best after step {last['step']}, the last: {_figures(last)}"
        return f"held-out {data}: best after step {best['step']}: {_figures(best)}; after step {last['step']}, the last: {_figures(last)}"
    return ""


def _figures(record: dict[str, Any]) -> str:
    corpus = [f"corpus loss {record['corpus_loss']:.4f}"] if record.get("corpus_loss") is not None else []
    if record.get("loss_dpo") is None:
        return corpus[0]
    pairs = f"DPO loss {record['loss_dpo']:.4f}, accuracy {record['rewards/accuracies']:.3f}, margin {record['rewards/margins']:.4f}"
    return ", ".join([pairs, *corpus])
