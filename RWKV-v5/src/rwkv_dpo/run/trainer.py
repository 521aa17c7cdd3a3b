"""Assembles a run: device, precision, model, data, callbacks, Lightning trainer."""

import logging
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.batches.loader import build_loader
from rwkv_dpo.batches.sampling import check_magic_prime
from rwkv_dpo.data.corpus import Corpus, open_corpus
from rwkv_dpo.data.corpus_names import name_corpus
from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.data.tokenizer import NAME as WORLD_TOKENIZER
from rwkv_dpo.devices.device import COMPUTE_DTYPES, pick_device, set_up
from rwkv_dpo.devices.processes import build_lightning, check_devices, meet
from rwkv_dpo.devices.ranks import Ranks
from rwkv_dpo.kernels.wkv5 import choose_backend
from rwkv_dpo.model.checkpoint import SHAPE_FLAGS, check_flags, empty_model, load_into, read_checkpoint, shape_of, version_of
from rwkv_dpo.model.init import init_weights
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.optimizer.adamw import check_optim
from rwkv_dpo.optimizer.length import check_trains, far_end
from rwkv_dpo.optimizer.state import trainable
from rwkv_dpo.run.config import RunConfig
from rwkv_dpo.run.dry_run import dry_run
from rwkv_dpo.run.pair_files import doubts, open_pair_files
from rwkv_dpo.run.start import begin_folder, find_start, plan_stage
from rwkv_dpo.run_folder.identity import identity_of
from rwkv_dpo.run_folder.lock import RunLock
from rwkv_dpo.run_folder.resume import load, start_of
from rwkv_dpo.training.checkpoints import Checkpoints
from rwkv_dpo.training.halt import Halt, Halted, StopOnSignal
from rwkv_dpo.training.last import LastCheckpoints, WeightsOfRankZero
from rwkv_dpo.training.metrics import MetricsLog
from rwkv_dpo.training.module import CLIP_NORM, DPOModule
from rwkv_dpo.training.progress import RunBar, Summary
from rwkv_dpo.training.reference import StartIsReference, tell_differences
from rwkv_dpo.training.reference_check import ReferenceCheck
from rwkv_dpo.training.validation import ValidPairs
from rwkv_dpo.training.wandb_log import WandbLog
from rwkv_dpo.tuning.tuning import Tuning, begin_tuning, keep_small

log = logging.getLogger(__name__)


def tell_corpus(config: RunConfig, given: frozenset[str]) -> RunConfig:
    """--data_type is what the file is, where it was not given."""
    if not config.uses_corpus:
        return config
    data_file, data_type = name_corpus(config.data_file, config.data_type if "data_type" in given else "")
    return replace(config, data_file=data_file, data_type=data_type)


def open_data(config: RunConfig, vocab_size: int) -> tuple[Corpus | None, PairSet | None, PairSet | None]:
    """Corpus, training pairs and held-out pairs, as far as the run uses them."""
    c = config
    corpus = open_corpus(c.data_file, c.data_type, vocab_size, c.ctx_len, c.load_model) if c.uses_corpus else None
    if corpus is not None and config.magic_prime:
        check_magic_prime(config.magic_prime, corpus.n_tokens, config.ctx_len, config.my_pile_shift)
    vocab_size = vocab_size or (corpus.vocab_size if corpus else 0)
    pairs, valid = open_pair_files(config, vocab_size)
    for flag, one in (("dpo_train_file", pairs), ("dpo_valid_file", valid)):
        if one is not None and corpus is not None and corpus.characters and one.header.get("tokenizer") == WORLD_TOKENIZER:
            refuse(
                f"--{flag} {getattr(c, flag)}: its tokens are the World tokenizer's, and {corpus.source} becomes {corpus.how}; "
                "--vocab_size 65536 reads both alike"
            )
    return corpus, pairs, valid


def shape_of_flags(config: RunConfig) -> ModelShape:
    return ModelShape(
        n_layer=config.n_layer, n_embd=config.n_embd, dim_att=config.dim_att or config.n_embd,
        dim_ffn=config.dim_ffn or int(config.n_embd * 3.5) // 32 * 32, vocab_size=config.vocab_size,
        head_size=config.head_size_a, head_size_divisor=config.head_size_divisor,
    )  # fmt: skip


def expected_shape(config: RunConfig, given: frozenset[str]) -> ModelShape:
    """resolve_shape's for a dry run, which needs no checkpoint: the flags say the shape of one that is not there."""
    if config.load_partial:
        return shape_of_flags(config)
    if not config.load_model or Path(config.load_model).exists():
        return resolve_shape(config, given)[0]
    missing = [f"--{name}" for name in ("n_layer", "n_embd", "vocab_size") if name not in given or not getattr(config, name)]
    if missing:
        refuse(f"--load_model {config.load_model}: no such file; --dry_run 1 can do without when flags say its shape: {', '.join(missing)}")
    log.warning("--load_model %s is not there: its shape is taken from the flags", config.load_model)
    return shape_of_flags(config)


def resolve_shape(config: RunConfig, given: frozenset[str]) -> tuple[ModelShape, dict[str, torch.Tensor] | None]:
    """The model's shape and, where one is loaded, the checkpoint's weights. The file decides; given flags must agree.

    vocab_size may stay 0: then it comes from the corpus.
    """
    from_flags = shape_of_flags(config)
    if not config.load_model or config.my_pile_stage == 1:
        return from_flags, None
    weights = read_checkpoint(config.load_model, partial=config.load_partial == 1)
    if config.strategy.startswith("deepspeed_stage_3") and any(name.endswith(".time_state") for name in weights):
        refuse(f"--strategy {config.strategy}: {config.load_model} has tuned states, which stage 3 doesn't share out; 1 and 2, and ddp, do")
    if config.load_partial:
        return from_flags, weights
    shape = shape_of(weights, config.load_model)
    wanted = {field: getattr(from_flags, field) for field, flag in SHAPE_FLAGS.items() if flag in given and getattr(config, flag)}
    check_flags(shape, wanted, config.load_model)
    return replace(shape, head_size_divisor=config.head_size_divisor), weights


def build_model(config: RunConfig, shape: ModelShape, weights: dict[str, torch.Tensor] | None, device: torch.device) -> RWKV:
    if shape.vocab_size < 1:
        refuse("--vocab_size is needed without --load_model (65536 for the RWKV World vocabulary)")
    wkv = choose_backend(config.wkv_backend, device).wkv5
    version = version_of(weights, config.load_model) if weights else "5"
    model = empty_model(shape, version, wkv, COMPUTE_DTYPES[config.precision], grad_cp=config.grad_cp, dropout=config.dropout)
    keep_small(model, config)
    if weights is None or config.load_partial:
        init_weights(model, config.lr_init, config.seed)
    if weights is not None:
        load_into(model, weights, config.load_model, partial=config.load_partial == 1)
    return model


def build_trainer(
    config: RunConfig, model: RWKV, pairs: PairSet | None, valid: PairSet | None, device: torch.device, last: LastCheckpoints,
    tuning: Tuning | None,
) -> pl.Trainer:  # fmt: skip
    folder = Path(config.proj_dir)
    callbacks: list[pl.Callback] = [WeightsOfRankZero()] if config.my_pile_stage >= 2 else []
    checkpoints = Checkpoints(config, folder, last.metrics, tuning, last.identity)
    callbacks += [last.metrics, checkpoints]
    sets = [one for one in (pairs, valid) if one is not None]
    if sets and config.dpo_ref == "recompute":
        callbacks.append(StartIsReference(config, folder, sets, last.halt))
    if pairs is not None:
        callbacks.append(ReferenceCheck(config, pairs))
    held_out = ValidPairs(config, folder, valid, last.halt) if valid is not None else None
    if held_out is not None:
        callbacks.append(held_out)
    if config.wandb:
        callbacks.append(WandbLog(config, folder, last.metrics, held_out))
    if config.enable_progress_bar:
        callbacks.append(RunBar(config, last.metrics))
    callbacks += [last, StopOnSignal(last.halt), Summary(config, folder, checkpoints)]
    n_trained = sum(parameter.numel() for _, parameter in trainable(model))
    trainer = build_lightning(
        config, device, n_trained, max_epochs=config.last_epoch - config.epoch_begin, max_steps=config.total_steps,
        accumulate_grad_batches=config.accumulate_grad_batches, gradient_clip_val=CLIP_NORM, callbacks=callbacks,
        use_distributed_sampler=False, num_sanity_val_steps=0, log_every_n_steps=1,
    )  # fmt: skip
    # Lightning's handler of SIGTERM talks to the other ranks in the middle of whatever they do.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def train(config: RunConfig, given: frozenset[str]) -> None:
    """One run, from checked settings to rwkv-final.pth."""
    if config.dry_run:
        print(dry_run(config, expected_shape(config, given)))
        return
    device = pick_device(config.accelerator, "--accelerator")
    check_devices(config, device)
    check_optim(config)
    ranks = meet(config, device)
    with RunLock(Path(config.proj_dir)) as lock:
        config, shape_there = ranks.told("plan", lambda: plan(config, given, lock))
        set_up(device, config.precision, keep_memory=config.cpu_malloc == 1)
        _train(config, given, device, ranks, lock, shape_there if ranks.rank else None)


def plan(config: RunConfig, given: frozenset[str], lock: RunLock) -> tuple[RunConfig, ModelShape | None]:
    """The settings, with what the files and the run folder say; and the shape of a checkpoint that lies in the run folder, which the
    other ranks may not see."""
    if Path(config.proj_dir).is_dir():
        lock.take()
    config = plan_stage(tell_corpus(config, given))
    if config.my_pile_stage >= 2:
        check_trains(config)
    return config, resolve_shape(config, given)[0] if config.my_pile_stage >= 2 else None


def _train(
    config: RunConfig, given: frozenset[str], device: torch.device, ranks: Ranks, lock: RunLock, shape_there: ModelShape | None
) -> None:
    """shape_there: of the checkpoint that rank 0 has read, and this rank won't."""
    shape, weights = (shape_there, None) if shape_there else resolve_shape(config, given)
    corpus, pairs, valid = open_data(config, shape.vocab_size)
    for doubt in doubts(config, pairs, valid):
        rank_zero_only(log.warning)("%s", doubt)
    if not shape.vocab_size and corpus is not None:
        shape = replace(shape, vocab_size=corpus.vocab_size)
    torch.manual_seed(config.seed)  # for dropout
    model = build_model(config, shape, weights, device)
    is_new = weights is None
    del weights  # a mapped file counts as memory in use for as long as a tensor refers to it
    start = ranks.told("start", lambda: find_start(config, identity_of(config, corpus, pairs, valid), lock))
    if start.end:
        log.info("%s", start.end)
        return
    saved = load(start.resumes) if start.resumes and ranks.rank == 0 else None
    base_sha256 = start.identity.content["load_model"]
    tuning = begin_tuning(model, config, given, start_of(saved), base_sha256)
    ranks.told("folder", lambda: begin_folder(config, start, lock, saved, model, is_new, corpus, tuning))
    folder = Path(config.proj_dir)
    if config.my_pile_stage == 1:
        log.info("wrote %s; now run with --my_pile_stage 2 or 3", folder / "rwkv-init.pth")
        return
    log.info("%s", describe(config, shape, corpus, pairs, device))
    if told := far_end(config):
        rank_zero_only(log.warning)("%s", told)
    if tuning is not None:
        log.info("%s", describe_tuning(config, model))
    rank_zero_only(tell_differences)(config, {"dpo_train_file": pairs, "dpo_valid_file": valid}, base_sha256)
    halt = Halt()
    last = LastCheckpoints(config, MetricsLog(config, folder, halt), halt, saved, start.identity)
    trainer = build_trainer(config, model, pairs, valid, device, last, tuning)
    loader = build_loader(config, corpus, pairs, trainer.global_rank, device.type == "cuda")
    try:
        trainer.fit(DPOModule(model, config), loader)
    except Halted as halted:
        end(halted)


@rank_zero_only
def end(halted: Halted) -> None:
    """Rank 0 speaks for all, and its status is the run's."""
    if halted.fault:
        refuse(halted.fault)
    log.info("%s", halted.message)


def describe(config: RunConfig, shape: ModelShape, corpus: Corpus | None, pairs: PairSet | None, device: torch.device) -> str:
    """A run in three lines."""
    how = f" ({corpus.how})" if corpus and corpus.how else ""
    data = [f"corpus {config.data_file or config.data_type}, {corpus.n_tokens:,} tokens{how}"] if corpus else []
    data += [f"{len(pairs):,} pairs of {config.dpo_train_file}"] if pairs else []
    return (
        f"RWKV-5 L{shape.n_layer} D{shape.n_embd} vocabulary {shape.vocab_size:,}, "
        f"{config.precision} on {config.world_size} x {device.type}\n"
        f"data: {'; '.join(data)}\n"
        f"epochs {config.epoch_begin} to {config.last_epoch - 1}, {config.total_steps} optimizer steps of "
        f"{config.micro_bsz} x {config.accumulate_grad_batches} x {config.world_size} samples, lr {config.lr_init:g} to {config.lr_final:g}"
    )


def describe_tuning(config: RunConfig, model: RWKV) -> str:
    """What --peft trains."""
    n_trained, n_all = (sum(p.numel() for p in some) for some in (dict(trainable(model)).values(), model.parameters()))
    return f"--peft {config.peft}: trains {n_trained:,} numbers; {n_all - n_trained:,} stay as they are"
