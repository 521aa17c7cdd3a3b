"""The Lightning module: passes micro-batches to the objective, sets learning rates, clips gradients. A Lightning batch is an optimizer
step. Its micro-batches, whose number may differ from step to step, are calls of its closure."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor
from typing_extensions import override

from rwkv_dpo.batches.loader import StepBatch
from rwkv_dpo.devices.strategy import accumulating
from rwkv_dpo.model.linear import refresh_casts
from rwkv_dpo.model.rwkv import RWKV, Block
from rwkv_dpo.objective.losses import Mixture
from rwkv_dpo.objective.objective import objective
from rwkv_dpo.optimizer.adamw import set_rates
from rwkv_dpo.optimizer.schedule import Schedule
from rwkv_dpo.training.guard import poisoned, skip_unless_finite

CLIP_NORM = 1.0
BuildOptimizer = Callable[[list[tuple[str, torch.nn.Parameter]]], torch.optim.Optimizer]


class DPOModule(pl.LightningModule):
    """What the callbacks read after an optimizer step: `metrics` of each of its micro-batches, `grad_norm` before clipping, `lr` and
    `weight_decay`."""

    def __init__(
        self, model: RWKV, mixture: Mixture, ratio: float, schedule: Schedule, first_step: int, build_optimizer: BuildOptimizer
    ) -> None:
        """mixture, ratio: of the objective. first_step: of the schedule, where the run begins. build_optimizer: makes the optimizer of the
        trained parameters."""
        super().__init__()
        self.model, self.mixture, self.ratio, self.schedule, self.first_step = model, mixture, ratio, schedule, first_step
        self.build_optimizer = build_optimizer
        self.metrics: list[dict[str, Tensor]] = []
        self.n_micro_batches = 0
        self.ref_logps: np.ndarray | None = None  # [pairs, 2] of a moving reference: micro-batches may have been made before it moved
        self.grad_norm = torch.zeros(())
        self.lr = self.weight_decay = 0.0

    @override
    def setup(self, stage: str) -> None:
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            from deepspeed.utils import set_z3_leaf_modules

            # ZeRO-3 gathers weights module by module, but within a block a layer uses its neighbours' weights: gather blocks as a whole.
            set_z3_leaf_modules(self.model, [Block])

    @override
    def on_train_batch_start(self, batch: StepBatch, batch_idx: int) -> None:
        self.metrics, self.n_micro_batches = [], len(batch)

    @override
    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        """The next micro-batch of the step."""
        loss, metrics = objective(self.model, batch[len(self.metrics)], self.mixture, self.ratio)
        self.metrics.append(metrics)
        return poisoned(loss) / len(batch)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.build_optimizer([(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad])

    @override
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        self.lr, self.weight_decay = set_rates(optimizer, self.schedule, self.first_step, self.trainer.global_step)
        with accumulating(self.trainer.strategy):
            for _ in range(self.n_micro_batches - 1):
                optimizer_closure()
        optimizer.step(closure=optimizer_closure)
        refresh_casts(self.model)
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            optimizer.zero_grad()

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Not here: every call of the closure comes here after a forward pass, when old gradients would take memory in addition to its
        activations."""

    @override
    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return  # its engine clips, and has the norm after the step
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Scaling by 1 would read and write every gradient once more; on a GPU, checking the norm would stall instead.
        if self.grad_norm.device.type != "cpu" or self.grad_norm > CLIP_NORM:
            torch.nn.utils.clip_grads_with_norm_(parameters, CLIP_NORM, self.grad_norm)
        skip_unless_finite(optimizer, parameters, self.grad_norm)

    @override
    def transfer_batch_to_device(self, batch: StepBatch, device: torch.device, dataloader_idx: int) -> StepBatch:
        if (refs := self.ref_logps) is not None:
            batch = tuple(replace(one, ref_logps=torch.from_numpy(refs[list(one.numbers)].astype(np.float32))) for one in batch)
        return tuple(one.to(device) for one in batch)
