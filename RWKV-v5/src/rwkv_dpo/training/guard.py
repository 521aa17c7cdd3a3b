"""Steps with a non-finite loss or gradient: they leave the weights unchanged, are named in the log, and eventually end a run."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor

from rwkv_dpo.batches.loader import Steps
from rwkv_dpo.devices.strategy import ScaledFloat16

log = logging.getLogger(__name__)
# A line names at most this many pairs and windows.
N_NAMED = 64


def poisoned(loss: Tensor) -> Tensor:
    """The loss, with a non-finite gradient if it is not finite itself: then the norm of the gradients, which all ranks share, tells all of
    them. An infinite loss may well have a finite gradient of its own: that of -logsigmoid(-inf) is -1."""
    return loss * (loss.detach() * 0 + 1)


def skip_unless_finite(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], grad_norm: Tensor) -> None:
    """Let the coming optimizer step leave weights and state unchanged if the norm is not finite."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        # torch's fused optimizers check this on the device; checking it here would make a GPU wait.
        optimizer.found_inf = (~torch.isfinite(grad_norm)).float()  # type: ignore[attr-defined]
    elif not torch.isfinite(grad_norm):
        for parameter in parameters:
            parameter.grad = None


def is_bad(trainer: pl.Trainer, loss: float, grad_norm: float) -> bool:
    """Whether the step just done had to be skipped. An overflow in fp16 is no fault as long as the loss scale can be lowered."""
    if not math.isfinite(loss):
        return True
    return not math.isfinite(grad_norm) and _loss_scale(trainer) <= 1


def _loss_scale(trainer: pl.Trainer) -> float:
    plugin = trainer.precision_plugin
    if isinstance(plugin, ScaledFloat16) and plugin.scaler is not None:
        return plugin.scaler.get_scale()
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return float(trainer.strategy.deepspeed_engine.optimizer.loss_scale)
    return 1.0


def not_finite(weights: Mapping[str, Tensor]) -> str:
    """The name of the first weight that contains NaN or infinity, "" if none does."""
    return next((name for name, weight in weights.items() if not torch.isfinite(weight).all()), "")


def name_samples(trainer: pl.Trainer, dataset: Steps, number: int, losses: list[Tensor]) -> str:
    """The pairs and windows of the micro-batches with a non-finite loss in the optimizer step with that number; of all micro-batches if no
    loss shows it. Every rank has to call this with its own losses."""
    bad = [k for k, loss in enumerate(losses) if not math.isfinite(loss)]
    on_ranks: list[Any] = [bad]
    if trainer.world_size > 1:
        on_ranks = [None] * trainer.world_size
        torch.distributed.all_gather_object(on_ranks, bad)
    calls = dataset.samples.of_step(number)
    if not any(on_ranks):
        on_ranks = [range(len(of_rank)) for of_rank in calls]
    samples = [sample for of_rank, numbers in zip(calls, on_ranks, strict=True) for k in numbers for sample in of_rank[k]]
    windows = sorted(sample.number for sample in samples if sample.is_window)
    pairs = dataset.samples.pairs
    rows = sorted(row for sample in samples if not sample.is_window for row in pairs.tree(sample.number)) if pairs else []
    named = [f"pairs in rows {_some(rows)} of dpo_train_file"] if rows else []
    named += [f"corpus windows from tokens {_some(windows)}"] if windows else []
    return ", ".join(named)


def _some(numbers: list[int]) -> str:
    rest = f" and {len(numbers) - N_NAMED} more" if len(numbers) > N_NAMED else ""
    return " ".join(map(str, numbers[:N_NAMED])) + rest
