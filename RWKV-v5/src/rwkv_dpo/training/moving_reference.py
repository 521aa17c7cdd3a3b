"""--dpo_sync_ref: a reference that follows the policy (TR-DPO: Gorbatovski et al. 2024, arXiv:2404.09656)."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from rwkv_dpo.data.pairs import PairSet, join_pairs
from rwkv_dpo.evaluation.scoring import scoring_batches
from rwkv_dpo.training.checkpoints import full_weights
from rwkv_dpo.training.module import DPOModule
from rwkv_dpo.training.optimizer_state import trainable
from rwkv_dpo.training.reference import fill, score_shared

log = logging.getLogger(__name__)


class MovingReference(pl.Callback):
    """After every N optimizer steps the reference becomes alpha * policy + (1 - alpha) * reference, and scores all pair sets again. Comes
    after --dpo_ref recompute has filled them in, and before anything that evaluates or saves. The reference's trained weights are kept on
    the CPU; its other weights are the policy's."""

    def __init__(
        self, sets: Sequence[PairSet], every: int, alpha: float, batch_tokens: int, ld_alpha: float, saved: Mapping[str, Any] | None
    ) -> None:
        """sets: those to train on first. batch_tokens: scored at once. saved: `state` of the run that this one continues, known to rank 0
        only."""
        self.sets, self.every, self.alpha, self.batch_tokens, self.ld_alpha = sets, every, alpha, batch_tokens, ld_alpha
        self.saved = saved
        self.weights: dict[str, Tensor] = {}
        self.step = 0

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        self.step = trainer.global_step
        saved = trainer.strategy.broadcast(dict(self.saved) if self.saved else None)
        if saved is None:
            self.weights = {name: weight.cpu().clone() for name, weight in full_weights(trainer, module).items()}
        else:
            self.weights = {name: weight.clone() for name, weight in saved["weights"].items()}
            fill(self.sets, saved["ref_logps"].numpy())
        self.saved = None
        module.ref_logps = self.sets[0].ref_logps

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, module: DPOModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if trainer.global_step != self.step and trainer.global_step % self.every == 0:
            self._move(trainer, module)
        self.step = trainer.global_step

    @property
    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"weights": self.weights, "ref_logps": torch.from_numpy(np.concatenate([pairs.ref_logps for pairs in self.sets]))}

    def _move(self, trainer: pl.Trainer, module: DPOModule) -> None:
        for name, weight in full_weights(trainer, module).items():
            self.weights[name].lerp_(weight.detach().cpu().to(self.weights[name].dtype), self.alpha)
        pairs = join_pairs(self.sets)
        batches = scoring_batches(pairs, self.batch_tokens)
        ref_logps = np.zeros((len(pairs), 2))
        with self._in_place_of(module):
            for first in range(0, len(batches), trainer.world_size):
                together = batches[first : first + trainer.world_size]
                found = score_shared(trainer, module.model, pairs, together, self.batch_tokens, self.ld_alpha)
                for rows, scores in zip(together, found, strict=True):
                    ref_logps[rows] = scores
        fill(self.sets, ref_logps)
        rank_zero_only(log.info)("step %d: the reference moved, and scored %d pairs (--dpo_sync_ref)", trainer.global_step, len(pairs))

    @contextlib.contextmanager
    def _in_place_of(self, module: DPOModule) -> Iterator[None]:
        """Within, the model computes with the reference's weights."""
        parameters = dict(trainable(module.model))
        with torch.no_grad():
            own = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
            for name, parameter in parameters.items():
                parameter.copy_(self.weights[name])
        module.model.eval()
        try:
            yield
        finally:
            module.model.train()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(own[name])
