"""The story of a run, from checked settings to rwkv-final.pth: device, data, model, tuning, run folder, Lightning."""

import functools
import logging
from dataclasses import dataclass, replace

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.batches.loader import Loader, Steps, build_loader
from rwkv_dpo.batches.samples import Samples
from rwkv_dpo.devices.device import pick_device, set_up
from rwkv_dpo.devices.processes import build_lightning, check_devices, meet, take_gpu
from rwkv_dpo.devices.ranks import Ranks
from rwkv_dpo.machine.facts import gather
from rwkv_dpo.machine.report import in_a_line
from rwkv_dpo.model.quantized import quantized
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective.losses import mixture_of
from rwkv_dpo.optimizer.adamw import build_optimizer, check_optim
from rwkv_dpo.optimizer.length import far_end
from rwkv_dpo.run.callbacks import build_callbacks
from rwkv_dpo.run.data import RunData, doubts, open_data, tell_corpus, tell_differences
from rwkv_dpo.run.dry_run import dry_run
from rwkv_dpo.run.model import build_model, expected_shape, resolve_shape
from rwkv_dpo.run.recipes import with_length, with_recipe
from rwkv_dpo.run.settings import RunSettings
from rwkv_dpo.run.start import Start, begin_folder, find_start, identity_of, plan_stage
from rwkv_dpo.run_folder.lock import RunLock
from rwkv_dpo.run_folder.resume import Saved, load, start_of
from rwkv_dpo.training.halt import Halted
from rwkv_dpo.training.module import CLIP_NORM, DPOModule
from rwkv_dpo.training.optimizer_state import trainable
from rwkv_dpo.training.tensorboard_log import check_tensorboard
from rwkv_dpo.training.wandb_log import check_wandb
from rwkv_dpo.tuning.settings import TuningSettings
from rwkv_dpo.tuning.tuning import Tuning, begin_tuning

log = logging.getLogger(__name__)


def train(settings: RunSettings, given: frozenset[str]) -> None:
    """One run. given: the flags that were typed. Raises InputError."""
    settings = with_recipe(settings, given)
    if settings.general.dry_run:
        print(dry_run(settings, expected_shape(settings, given)))
        return
    device = pick_device(settings.devices.accelerator, "--accelerator")
    check_devices(settings.devices, device)
    check_optim(settings.optimizer)
    check_tensorboard(settings.training.tensorboard)
    check_wandb(settings.training.wandb)
    ranks = meet(settings.devices, device)
    take_gpu(settings.devices, device, ranks)
    with RunLock(settings.folder.path) as lock:
        settings, shape_there = ranks.told("plan", lambda: plan(settings, given, lock))
        set_up(device, settings.devices.precision, keep_memory=settings.devices.cpu_malloc == 1)
        prepared = prepare(settings, given, device, ranks, lock, shape_there if ranks.rank else None)
        if prepared is not None:
            fit(prepared, device)


def plan(settings: RunSettings, given: frozenset[str], lock: RunLock) -> tuple[RunSettings, ModelShape | None]:
    """The settings, completed with what the files and the run folder say; and the shape of a checkpoint in the run folder, which the other
    ranks may not see."""
    if settings.folder.path.is_dir():
        lock.take()
    settings = plan_stage(tell_corpus(settings, given))
    return settings, resolve_shape(settings, given)[0] if settings.general.is_staged else None


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to train. saved: the checkpoint that it continues from, known to rank 0 only."""

    settings: RunSettings
    data: RunData
    model: RWKV
    tuning: Tuning | None
    start: Start
    saved: Saved | None


def prepare(
    settings: RunSettings, given: frozenset[str], device: torch.device, ranks: Ranks, lock: RunLock, shape_there: ModelShape | None
) -> Prepared | None:
    """Open and build what a run needs, and begin its folder; None if nothing is left to train. shape_there: that of the checkpoint that
    rank 0 has read, and this rank won't."""
    shape, weights = (shape_there, None) if shape_there else resolve_shape(settings, given)
    data = open_data(settings, shape.vocab_size)
    settings = with_length(settings, given, data)
    for doubt in doubts(settings, data):
        rank_zero_only(log.warning)("%s", doubt)
    if not shape.vocab_size and data.corpus is not None:
        shape = replace(shape, vocab_size=data.corpus.vocab_size)
    torch.manual_seed(settings.general.seed)  # for dropout
    model = build_model(settings, shape, weights, device)
    is_new = weights is None
    del weights  # a mapped file counts as used memory as long as a tensor refers to it
    start = ranks.told("start", lambda: find_start(settings, identity_of(settings, data), lock))
    if start.end:
        log.info("%s", start.end)
        return None
    saved = load(start.resumes) if start.resumes and ranks.rank == 0 else None
    base_sha256 = start.identity.content["load_model"]
    tuning = begin_tuning(model, settings.tuning, given, start_of(saved), settings.model.load_model, base_sha256)
    ranks.told("folder", lambda: begin_folder(settings, start, lock, saved, model, is_new, data, tuning))
    if settings.general.my_pile_stage == 1:
        log.info("wrote %s; now run with --my_pile_stage 2 or 3", settings.folder.path / "rwkv-init.pth")
        return None
    log.info("%s", describe(settings, shape, data, device))
    if device.type == "cuda" and ranks.rank == 0:
        log.info("%s", in_a_line(gather(device, thorough=False)))
    if told := far_end(settings.epochs, settings.length, settings.schedule):
        rank_zero_only(log.warning)("%s", told)
    if tuning is not None:
        log.info("%s", describe_tuning(settings.tuning, model))
    rank_zero_only(tell_differences)(settings, data.pair_files, base_sha256)
    return Prepared(settings, data, model, tuning, start, saved)


def fit(run: Prepared, device: torch.device) -> None:
    """Train, and end the run."""
    settings, model = run.settings, run.model
    callbacks = build_callbacks(settings, run.data, run.start.identity, run.saved, run.tuning)
    trainer = build_trainer(settings, model, device, callbacks)
    module = DPOModule(
        model, mixture_of(settings.objective), settings.objective.ratio, settings.schedule, settings.length.first_step,
        functools.partial(
            build_optimizer, settings=settings.optimizer, pile_stage=settings.general.my_pile_stage, seed=settings.general.seed,
            offload="offload" in settings.devices.strategy,
        ),
    )  # fmt: skip
    try:
        trainer.fit(module, loader_of(settings, run.data, trainer.global_rank, on_gpu=device.type == "cuda"))
    except Halted as halted:
        end(halted)


def build_trainer(settings: RunSettings, model: RWKV, device: torch.device, callbacks: list[pl.Callback]) -> pl.Trainer:
    """Lightning's trainer, without its signal handlers."""
    n_trained = sum(parameter.numel() for _, parameter in trainable(model))
    trainer = build_lightning(
        settings.devices, device, settings.batches.micro_bsz, n_trained, max_epochs=settings.length.n_epochs,
        max_steps=settings.length.total_steps, gradient_clip_val=CLIP_NORM, callbacks=callbacks, use_distributed_sampler=False,
        num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    # Lightning's SIGTERM handler communicates with the other ranks in the middle of whatever they do.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def loader_of(settings: RunSettings, data: RunData, rank: int, on_gpu: bool) -> Loader:
    """The optimizer steps of a rank."""
    length = settings.length
    samples = Samples(
        settings.batches, settings.data.ctx_len, settings.general.seed, settings.devices.world_size, length.accumulated, data.corpus,
        data.pairs,
    )  # fmt: skip
    return build_loader(Steps(samples, rank), length.epoch_begin, length.steps_per_epoch, on_gpu)


@rank_zero_only
def end(halted: Halted) -> None:
    """Rank 0 prints for all, and its status is the run's."""
    if halted.fault:
        refuse(halted.fault)
    log.info("%s", halted.message)


def describe(settings: RunSettings, shape: ModelShape, data: RunData, device: torch.device) -> str:
    """A run in three lines."""
    length, files, corpus = settings.length, settings.data, data.corpus
    how = f" ({corpus.how})" if corpus and corpus.how else ""
    read = [f"corpus {files.data_file or files.data_type}, {corpus.n_tokens:,} tokens{how}"] if corpus else []
    read += [f"{len(data.pairs):,} pairs of {files.dpo_train_file}"] if data.pairs else []
    return (
        f"RWKV-{shape.version} L{shape.n_layer} D{shape.n_embd} vocabulary {shape.vocab_size:,}, "
        f"{settings.devices.precision} on {settings.devices.world_size} x {device.type}\n"
        f"data: {'; '.join(read)}\n"
        f"epochs {length.epoch_begin} to {length.end - 1}, {length.total_steps} optimizer steps of "
        f"{settings.batches.micro_bsz} x {length.accumulated} x {settings.devices.world_size} samples, "
        f"lr {settings.optimizer.lr_init:g} to {settings.optimizer.lr_final:g}"
    )


def describe_tuning(tuning: TuningSettings, model: RWKV) -> str:
    """What --peft trains, and what --quant holds in fewer bits."""
    n_trained, n_others = (sum(p.numel() for p in some) for some in (dict(trainable(model)).values(), model.parameters()))
    matrices = quantized(model).values()
    n_held, n_bytes = sum(matrix.shape.numel() for matrix in matrices), sum(matrix.nbytes for matrix in matrices)
    held = f", {n_held:,} of them in {n_bytes / 1e6:,.1f} MB (--quant {tuning.quant})" if n_held else ""
    return f"--peft {tuning.peft}: trains {n_trained:,} parameters; {n_others - n_trained + n_held:,} are frozen{held}"
