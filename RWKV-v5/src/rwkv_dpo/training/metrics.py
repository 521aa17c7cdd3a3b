"""What happens around the steps: metrics, logs, checkpoints and evaluation."""

import datetime
import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from typing_extensions import override

from rwkv_dpo.batches.loader import StepBatch
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.optimizer.length import RunLength
from rwkv_dpo.training.guard import is_bad, name_samples
from rwkv_dpo.training.halt import Halt
from rwkv_dpo.training.module import DPOModule

log = logging.getLogger(__name__)


class MetricsLog(pl.Callback):
    """One JSON line per optimizer step, averaged over the pairs (or the windows' tokens) of its micro-batches on all ranks; and the
    original's train_log.txt, one line per epoch."""

    def __init__(self, length: RunLength, pairs_a_sample: float, flags: Mapping[str, Any], folder: Path, halt: Halt) -> None:
        """pairs_a_sample: on average. flags: those of the run, for the head of train_log.txt."""
        self.length, self.flags, self.folder, self.halt = length, flags, folder, halt
        # Of earlier epochs, by their number of samples.
        self.pairs_seen = round(length.epoch_begin * length.epoch_steps * length.samples * pairs_a_sample)
        self.skipped_steps = self.bad_in_a_row = 0
        self.bad_step = ""  # the last one, in a few words
        self.stops = False  # some rank was signalled: all know it from the same step on
        self.epoch_losses: list[float] = []
        self.record: dict[str, Any] = {}  # of the last step

    @override
    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.halt.append(self.folder / "train_log.txt", f"NEW RUN {datetime.datetime.now():%Y-%m-%d-%H-%M-%S}\n{dict(self.flags)}\n")

    @override
    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.clock = time.perf_counter()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.epoch_losses = []
        self.clock = time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, module: DPOModule, outputs: Any, batch: StepBatch, batch_idx: int) -> None:  # type: ignore[override]
        length = self.length
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            module.grad_norm = torch.as_tensor(trainer.strategy.deepspeed_engine.get_global_grad_norm() or 0.0)
        names, sums = list(module.metrics[0]), weighted_sums(batch, module.metrics)
        n_tokens = sum(one.step.forest.tokens.numel() for one in batch)
        shared = torch.tensor([n_tokens, self.halt.signalled, bool(self.halt.fault)], dtype=torch.float32)
        norm = module.grad_norm.reshape(1).to(sums.device, torch.float32, non_blocking=True)
        if trainer.world_size > 1:
            shared = shared.to(sums.device, non_blocking=True)
            sums, shared = (trainer.strategy.reduce(x, reduce_op="sum") for x in (sums, shared))
        # In one transfer: each wait for the device lets it run dry. At the second list it is already idle.
        numbers = torch.cat([sums[:, 0] / sums[:, 1], sums[:, 1], norm]).tolist()
        means, weights, grad_norm = numbers[: len(names)], numbers[len(names) : -1], numbers[-1]
        tokens, signals, faults = shared.tolist()
        self.halt.check(faults > 0)
        self.stops = signals > 0
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.pairs_seen += int(weights[names.index("rewards/margins")]) if "rewards/margins" in names else 0
        loss = means[names.index("loss")]
        bad = is_bad(trainer, loss, grad_norm)
        self.skipped_steps, self.bad_in_a_row = self.skipped_steps + bad, self.bad_in_a_row + 1 if bad else 0
        record = {
            "step": length.epoch_begin * length.steps_per_epoch + trainer.global_step,
            "epoch": length.epoch_begin + trainer.current_epoch,
            **{name: finite(mean) for name, mean in zip(names, means, strict=True)},
            "grad_norm": finite(grad_norm),
            "lr": module.lr,
            "weight_decay": module.weight_decay,
            "tokens": int(tokens),
            "tokens_per_s": tokens / seconds,
            "pairs_seen": self.pairs_seen,
            "skipped_steps": self.skipped_steps,
            "peak_memory_gb": peak_memory_gb(sums.device),
        }
        if math.isfinite(loss):
            self.epoch_losses.append(loss)
        self.record = record
        if trainer.is_global_zero:
            self.halt.append(self.folder / "metrics.jsonl", as_json(record) + "\n")
        if bad:
            self.bad_step = f"step {record['step']}: loss {loss:g}, gradient norm {grad_norm:g}"
            self._name_bad_step(trainer, record["step"] - 1, [metrics["loss"] for metrics in module.metrics])

    def _name_bad_step(self, trainer: pl.Trainer, number: int, losses: list[torch.Tensor]) -> None:
        samples = name_samples(trainer, trainer.train_dataloader.dataset, number, losses)  # type: ignore[union-attr]
        if trainer.is_global_zero:
            log.warning("%s, skipped; it had %s", self.bad_step, samples)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if trainer.is_global_zero and self.epoch_losses:
            loss, epoch = float(np.mean(self.epoch_losses)), trainer.current_epoch
            numbers = f"{loss:.6f} {math.exp(min(loss, 700)):.4f} {module.lr:.8f}"
            line = f"{self.length.epoch_begin + epoch} {numbers} {datetime.datetime.now()} {epoch}\n"
            self.halt.append(self.folder / "train_log.txt", line)


def weighted_sums(batch: StepBatch, metrics: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """fp32 [metrics, 2], for a step's micro-batches: the weighted sum of each metric, and the sum of its weights."""
    values = torch.stack([torch.stack([value.float() for value in of_one.values()]) for of_one in metrics])
    # Losses of pairs are weighted already.
    own = [{"loss": 1, "loss_dpo": 1, "loss_general": one.step.n_window_rows} for one in batch]
    of_names = [[weights.get(name, one.step.n_pairs) for name in metrics[0]] for one, weights in zip(batch, own, strict=True)]
    weights = torch.tensor(of_names, dtype=torch.float32).to(values.device, non_blocking=True)
    return torch.stack([(weights * values).sum(0), weights.sum(0)], 1)


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far: that of the GPU allocator, or of the process's resident set; 0 if the system doesn't report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def finite(value: float) -> float | None:
    """The value, or None if it isn't finite: JSON has no NaN."""
    return value if math.isfinite(value) else None
