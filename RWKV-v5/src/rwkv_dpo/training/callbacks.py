"""What happens around the steps: metrics, logs, checkpoints and evaluation."""

import datetime
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from tqdm import tqdm

from rwkv_dpo.atomic import link_hashed
from rwkv_dpo.config import RunConfig
from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.evaluation.pairs import evaluate_pairs
from rwkv_dpo.json_text import as_json
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.tuning import Tuning
from rwkv_dpo.training.guard import is_bad, name_samples, not_finite
from rwkv_dpo.training.halt import Halt, Halted
from rwkv_dpo.training.identity import Identity
from rwkv_dpo.training.module import DPOModule
from rwkv_dpo.training.run_folder import save_end, saved_name

log = logging.getLogger(__name__)


class MetricsLog(pl.Callback):
    """One JSON line an optimizer step, averaged over the pairs, or the windows' tokens, of its micro-batches on all ranks; and the
    original's train_log.txt, a line an epoch."""

    def __init__(self, config: RunConfig, folder: Path, halt: Halt) -> None:
        self.config, self.folder, self.halt = config, folder, halt
        self.pairs_seen = config.epoch_begin * config.epoch_steps * config.micro_bsz * config.world_size * config.uses_pairs
        self.sums: dict[str, torch.Tensor] = {}  # by metric: the weighted sum and the sum of the weights
        self.losses: list[tuple[int, torch.Tensor]] = []  # of this rank's micro-batches, by their numbers
        self.n_tokens = self.steps_done = self.skipped_steps = self.bad_in_a_row = 0
        self.bad_step = ""  # the last one, in a few words
        self.stops = False  # some rank was signalled: all know it from the same step on
        self.epoch_losses: list[float] = []
        self.record: dict[str, Any] = {}  # of the step that has just ended; empty in its middle

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.halt.append(self.folder / "train_log.txt", f"NEW RUN {datetime.datetime.now():%Y-%m-%d-%H-%M-%S}\n{self.config}\n")

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.steps_done, self.clock = trainer.global_step, time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.epoch_losses = []
        self.clock = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: DPOModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for name, value in module.metrics.items():
            weight = {"loss": 1, "loss_general": batch.step.n_window_rows}.get(name, batch.step.n_pairs)
            self.sums[name] = self.sums.get(name, 0) + weight * torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)])
        first = (self.config.epoch_begin + trainer.current_epoch) * self.config.epoch_steps
        self.losses.append((first + batch_idx, module.metrics["loss"]))
        self.n_tokens += module.n_tokens
        self.record = {}
        if trainer.global_step == self.steps_done:
            return
        self.steps_done = trainer.global_step
        self._end_of_step(trainer, module)

    def _end_of_step(self, trainer: pl.Trainer, module: DPOModule) -> None:
        c = self.config
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            module.grad_norm = torch.as_tensor(trainer.strategy.deepspeed_engine.get_global_grad_norm() or 0.0)
        names = list(self.sums)
        sums = torch.stack(list(self.sums.values()))
        shared = torch.tensor([self.n_tokens, self.halt.signalled, bool(self.halt.fault)], device=sums.device, dtype=torch.float32)
        if trainer.world_size > 1:
            sums, shared = (trainer.strategy.reduce(x, reduce_op="sum") for x in (sums, shared))
        means = (sums[:, 0] / sums[:, 1]).tolist()
        tokens, signals, faults = shared.tolist()
        self.halt.check(faults > 0)
        self.stops = signals > 0
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.pairs_seen += len(self.losses) * c.micro_bsz * c.world_size * c.uses_pairs
        loss, grad_norm = means[names.index("loss")], float(module.grad_norm)
        bad = is_bad(trainer, loss, grad_norm)
        self.skipped_steps, self.bad_in_a_row = self.skipped_steps + bad, self.bad_in_a_row + 1 if bad else 0
        record = {
            "step": c.epoch_begin * c.steps_per_epoch + self.steps_done,
            "epoch": c.epoch_begin + trainer.current_epoch,
            **{name: _finite(mean) for name, mean in zip(names, means, strict=True)},
            "grad_norm": _finite(grad_norm),
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
            self._name_bad_step(trainer)
        self.sums, self.losses, self.n_tokens = {}, [], 0

    def _name_bad_step(self, trainer: pl.Trainer) -> None:
        samples = name_samples(trainer, trainer.train_dataloader.dataset, self.losses)  # type: ignore[union-attr]
        if trainer.is_global_zero:
            log.warning("%s, skipped; it had %s", self.bad_step, samples)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if trainer.is_global_zero and self.epoch_losses:
            loss, epoch = float(np.mean(self.epoch_losses)), trainer.current_epoch
            numbers = f"{loss:.6f} {math.exp(min(loss, 700)):.4f} {module.lr:.8f}"
            line = f"{self.config.epoch_begin + epoch} {numbers} {datetime.datetime.now()} {epoch}\n"
            self.halt.append(self.folder / "train_log.txt", line)


class Checkpoints(pl.Callback):
    """rwkv-{epoch}.pth every epoch_save epochs and after the last, rwkv-final.pth at the end, rwkv-last-good.pth where too many bad steps
    end the run: fp32, official names. With --peft, what it trains alone: adapter-{epoch} or state-{epoch}.pth. Beside the final one,
    whose end it is. Weights that are not finite are never saved, and end the run."""

    def __init__(self, config: RunConfig, folder: Path, metrics: MetricsLog, tuning: Tuning | None, identity: Identity) -> None:
        self.config, self.folder, self.metrics, self.tuning, self.identity = config, folder, metrics, tuning, identity
        self.halt = metrics.halt
        self.newest, self.saved_at = Path(), -1  # what was saved last, and the step it is of
        self.written: list[Path] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: DPOModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        n, bad_step = self.metrics.bad_in_a_row, self.metrics.bad_step
        if n >= self.config.max_bad_steps:
            path = self._save(trainer, module, "last-good")
            raise Halted("", f"stopped at {bad_step}, after {n} such steps in a row (--max_bad_steps); weights before them: {path}")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        c, epoch = self.config, trainer.current_epoch
        is_last = c.epoch_begin + epoch + 1 >= c.last_epoch
        if is_last or (c.epoch_save and epoch % c.epoch_save == 0):
            self._save(trainer, module, str(c.epoch_begin + epoch))

    def on_train_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        self._save(trainer, module, "final")
        self.halt.write(trainer, lambda: save_end(self.config, self.identity, trainer.global_step))

    def _save(self, trainer: pl.Trainer, module: DPOModule, label: str) -> Path:
        weights, path = full_weights(trainer, module), self.folder / saved_name(self.config, label)
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
            self.written.append(path)

        self.halt.write(trainer, write)
        return path


class ValidPairs(pl.Callback):
    """Loss, accuracy and margins on held-out pairs at the end of every epoch: a printed line and a line of valid.jsonl."""

    def __init__(self, config: RunConfig, folder: Path, pairs: PairSet, halt: Halt) -> None:
        self.config, self.folder, self.pairs, self.halt = config, folder, pairs, halt
        self.record: dict[str, Any] = {}  # of the last epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        c, shows = self.config, self.config.enable_progress_bar and trainer.is_global_zero
        module.model.eval()
        with tqdm(total=len(self.pairs), unit="pair", desc="held-out", leave=False, disable=None if shows else True) as bar:
            metrics = evaluate_pairs(module.model, self.pairs, c.dpo_beta, c.chunk_ctx or 2 * c.ctx_len, bar.update)
        module.model.train()
        epoch, step = c.epoch_begin + trainer.current_epoch, c.epoch_begin * c.steps_per_epoch + trainer.global_step
        figures = {name: _finite(value) for name, value in metrics.items()}
        self.record = {"epoch": epoch, "step": step, "pairs": len(self.pairs), **figures}
        if not trainer.is_global_zero:
            return
        self.halt.append(self.folder / "valid.jsonl", as_json(self.record) + "\n")
        log.info(
            "epoch %d, %d held-out pairs: DPO loss %.4f, accuracy %.3f, margin %.4f",
            epoch, len(self.pairs), metrics["loss_dpo"], metrics["rewards/accuracies"], metrics["rewards/margins"],
        )  # fmt: skip


def full_weights(trainer: pl.Trainer, module: DPOModule) -> dict[str, torch.Tensor]:
    """Every trained parameter in fp32. With DeepSpeed they are gathered from the ranks, so that all ranks have to call this, and come to
    the CPU one by one: a device may hold its part of the model and no more."""
    parameters = [(name, parameter) for name, parameter in module.model.named_parameters() if parameter.requires_grad]
    if not isinstance(trainer.strategy, DeepSpeedStrategy):
        return {name: parameter.detach() for name, parameter in parameters}
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter).cpu() for name, parameter in parameters}


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held so far: the GPU allocator's, or the process's resident set; 0 where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None
