"""The callback that keeps `last/`: saves everything that a run needs to continue, and restores it."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor
from typing_extensions import override

from rwkv_dpo.batches.loader import Loader
from rwkv_dpo.optimizer.length import RunLength
from rwkv_dpo.run_folder.contents import log_sizes
from rwkv_dpo.run_folder.identity import Identity
from rwkv_dpo.run_folder.resume import Progress, Saved, last_of, save
from rwkv_dpo.training.checkpoints import full_weights
from rwkv_dpo.training.guard import not_finite
from rwkv_dpo.training.halt import Halted
from rwkv_dpo.training.metrics import MetricsLog
from rwkv_dpo.training.module import DPOModule
from rwkv_dpo.training.moving_reference import MovingReference
from rwkv_dpo.training.optimizer_state import OptimizerState, read_state, set_sharded, trainable, write_state
from rwkv_dpo.training.settings import SavingSettings

log = logging.getLogger(__name__)


class WeightsOfRankZero(pl.Callback):
    """Give every rank the weights that rank 0 has read from the run folder."""

    @override
    def setup(self, trainer: pl.Trainer, module: DPOModule, stage: str) -> None:  # type: ignore[override]
        with torch.no_grad():
            for parameter in module.model.parameters():
                parameter.copy_(_from_rank_0(trainer, parameter if trainer.is_global_zero else None, parameter))


class LastCheckpoints(pl.Callback):
    """Saves every save_every optimizer steps, after every epoch, and when the run is told to stop. `trainer.global_step` counts the steps
    of the whole run, including those before a resumption. Comes after the callbacks whose state it saves. saved: the checkpoint to continue
    from; known to rank 0 only, which passes it to the others."""

    def __init__(
        self, settings: SavingSettings, folder: Path, length: RunLength, seed: int, has_scaler: bool, metrics: MetricsLog,
        saved: Saved | None, identity: Identity, reference: MovingReference | None = None,
    ) -> None:  # fmt: skip
        """seed: the run's. has_scaler: the loss is scaled (fp16)."""
        self.reference = reference
        self.settings, self.folder, self.length, self.seed, self.has_scaler = settings, folder, length, seed, has_scaler
        self.metrics, self.halt, self.saved, self.identity = metrics, metrics.halt, saved, identity
        self.resumes = False

    @override
    def setup(self, trainer: pl.Trainer, module: DPOModule, stage: str) -> None:  # type: ignore[override]
        """Before the strategy takes the model: restore weights and counters."""
        saved = self.saved
        progress = trainer.strategy.broadcast(saved.progress if saved else None)
        self.resumes = progress is not None
        if progress is None:
            return
        self._go_on_from(trainer, progress)
        with torch.no_grad():
            for name, parameter in trainable(module.model):
                parameter.copy_(_from_rank_0(trainer, saved.weights[name] if saved else None, parameter))

    def _go_on_from(self, trainer: pl.Trainer, progress: Progress) -> None:
        length, metrics = self.length, self.metrics
        epoch, steps = divmod(progress.step, length.steps_per_epoch)
        loader = trainer.fit_loop._data_source.instance
        assert isinstance(loader, Loader)
        position = loader.dataset.samples.position
        position.epoch, position.step = epoch, steps
        position.shift = progress.samples - _samples_before(length, progress.step)
        loader.sampler.set_epoch(epoch)
        _set_counters(trainer, epoch, steps, progress.step)
        metrics.pairs_seen, metrics.epoch_losses = progress.pairs_seen, list(progress.epoch_losses)
        metrics.skipped_steps, metrics.bad_in_a_row = progress.skipped_steps, progress.bad_in_a_row

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        """After the strategy has created the optimizer: restore its state, the loss scale and the generators."""
        if not self.resumes:
            return
        saved = self.saved
        known = (_forms(saved.optimizer), saved.generators, saved.scaler) if saved else ({}, [], {})
        forms, generators, scaler = trainer.strategy.broadcast(known)

        def tensor(name: str, key: str) -> Tensor:
            return _from_rank_0(trainer, saved.optimizer[name][key] if saved else None, forms[name][key])

        write_state(trainer, module.model, forms, tensor)
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            self._set_master_weights(trainer, module)
        if scaler:
            _set_loss_scale(trainer, scaler)
        _set_generators(generators, trainer.global_rank, self.seed + trainer.global_step)
        if saved is not None:
            self._tell_last_good(saved.path)
            log.info("continuing after step %d of %d, from %s", trainer.global_step, self.length.total_steps, saved.path)
        self.saved = None

    def _set_master_weights(self, trainer: pl.Trainer, module: DPOModule) -> None:
        """With fp16, the engine has made its fp32 weights from rounded ones."""
        saved = self.saved
        for name, parameter in trainable(module.model):
            like = torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")
            set_sharded(parameter, _from_rank_0(trainer, saved.weights[name] if saved else None, like))

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, module: DPOModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        step, every = trainer.global_step, self.settings.save_every
        if step == self.length.total_steps or step % self.length.steps_per_epoch == 0:
            return  # the end of the epoch comes next
        if self.metrics.stops:
            self._save(trainer, module)
            self._stop(trainer)
        elif every and step % every == 0:
            self._save(trainer, module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if trainer.global_step == self.length.total_steps:
            return  # only rwkv-final.pth remains to be done
        self.metrics.epoch_losses = []
        self._save(trainer, module)
        if self.metrics.stops:
            self._stop(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        # With more patience, a run continues from where --early_stop has ended it.
        if trainer.is_global_zero and trainer.global_step == self.length.total_steps:
            shutil.rmtree(last_of(self.folder), ignore_errors=True)

    def _stop(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        raise Halted(f"stopped after step {step} of {self.length.total_steps}; the same command continues (--resume auto)")

    def _save(self, trainer: pl.Trainer, module: DPOModule) -> None:
        weights, names = full_weights(trainer, module), [name for name, _ in trainable(module.model)]
        if name := not_finite(weights):
            if trainer.is_global_zero:
                log.warning("step %d: %s is not finite; %s", trainer.global_step, name, self.halt.last_good or "nothing is saved")
            return
        parts = {
            "weights": {name: weights[name].detach().cpu() for name in names},
            "optimizer": read_state(trainer, module.model),
            "generators": _all_generators(trainer),
            "scaler": _loss_scale(trainer) if self.has_scaler else {},
            "reference": self.reference.state if self.reference else {},
        }

        def write() -> None:
            self._tell_last_good(save(last_of(self.folder), self._progress(trainer), parts, self.settings.keep))

        self.halt.write(trainer, write)

    def _progress(self, trainer: pl.Trainer) -> Progress:
        metrics, step = self.metrics, trainer.global_step
        position = trainer.train_dataloader.dataset.samples.position  # type: ignore[union-attr]
        return Progress(
            identity=self.identity.as_json(), step=step, samples=position.shift + _samples_before(self.length, step),
            pairs_seen=metrics.pairs_seen, epoch_losses=metrics.epoch_losses, skipped_steps=metrics.skipped_steps,
            bad_in_a_row=metrics.bad_in_a_row, logs=log_sizes(self.folder),
        )  # fmt: skip

    def _tell_last_good(self, path: Path) -> None:
        self.halt.last_good = f"the last good checkpoint is {path}"


def _samples_before(length: RunLength, step: int) -> int:
    """The number of samples that a run takes before its optimizer step number `step`, if all steps take the same number."""
    return (length.epoch_begin * length.epoch_steps + step * length.accumulated) * length.samples


def _from_rank_0(trainer: pl.Trainer, value: Tensor | None, like: Tensor) -> Tensor:
    """Rank 0's value, on the device of this rank."""
    device = trainer.strategy.root_device
    # A copy: the file that it is mapped from will be removed.
    value = torch.empty(like.shape, dtype=like.dtype, device=device) if value is None else value.to(device, copy=True)
    if trainer.world_size > 1:
        torch.distributed.broadcast(value, 0)
    return value


def _forms(state: OptimizerState) -> OptimizerState:
    """Shapes and types only."""
    return {name: {key: v.to("meta") if isinstance(v, Tensor) else v for key, v in values.items()} for name, values in state.items()}


def _set_counters(trainer: pl.Trainer, epoch: int, steps_in_epoch: int, step: int) -> None:
    """Set Lightning's loops as they are between two optimizer steps, which are its batches: this many into `epoch`, `step` in total."""

    def count(number: int, begun: int = 0) -> dict[str, int]:
        return {"ready": number + begun, "started": number + begun, "processed": number, "completed": number}

    loop = trainer.fit_loop
    state = loop.state_dict()
    begun = int(steps_in_epoch > 0)
    state["epoch_progress"] = {"total": count(epoch, begun), "current": count(epoch, begun)}
    batches = count(steps_in_epoch)
    state["epoch_loop.batch_progress"] = {"total": batches, "current": batches, "is_last_batch": False}
    steps = {"ready": step, "completed": step}
    state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"] = {"total": steps, "current": steps}
    loop.load_state_dict(state)


def _loss_scale(trainer: pl.Trainer) -> dict[str, Any]:
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return {"scale": float(trainer.strategy.deepspeed_engine.optimizer.loss_scale)}
    return trainer.precision_plugin.state_dict()


def _set_loss_scale(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        trainer.strategy.deepspeed_engine.optimizer.loss_scaler.cur_scale = state["scale"]
    else:
        trainer.precision_plugin.load_state_dict({**trainer.precision_plugin.state_dict(), **state})


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _all_generators(trainer: pl.Trainer) -> list[dict[str, Tensor]]:
    mine = _generators()
    if trainer.world_size == 1:
        return [mine]
    everyones: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyones, mine)
    return everyones


def _set_generators(states: list[dict[str, Tensor]], rank: int, seed: int) -> None:
    """A rank that the saved run did not have starts from `seed`."""
    if rank >= len(states):
        torch.manual_seed(seed)
        return
    torch.set_rng_state(states[rank]["cpu"])
    if "cuda" in states[rank] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[rank]["cuda"])
