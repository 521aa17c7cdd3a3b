"""The callbacks of a run, in the order in which they depend on one another, and the commands that its last lines suggest."""

import os
import shlex
from pathlib import Path

import pytorch_lightning as pl

from rwkv_dpo.base.script import CONSOLE
from rwkv_dpo.objective.losses import mixture_of
from rwkv_dpo.report.run_page import About
from rwkv_dpo.run.data import RunData
from rwkv_dpo.run.settings import RunSettings
from rwkv_dpo.run_folder.contents import saved_name
from rwkv_dpo.run_folder.identity import Identity
from rwkv_dpo.run_folder.resume import Saved
from rwkv_dpo.training.best import Best
from rwkv_dpo.training.checkpoints import Checkpoints
from rwkv_dpo.training.halt import Halt, StopOnSignal
from rwkv_dpo.training.last import LastCheckpoints, WeightsOfRankZero
from rwkv_dpo.training.metrics import MetricsLog
from rwkv_dpo.training.moving_reference import MovingReference
from rwkv_dpo.training.progress import RunBar, Summary
from rwkv_dpo.training.reference import StartIsReference
from rwkv_dpo.training.reference_check import ReferenceCheck
from rwkv_dpo.training.run_report import RunReport
from rwkv_dpo.training.samples import Prompts, Samples
from rwkv_dpo.training.tensorboard_log import TensorBoardLog
from rwkv_dpo.training.validation import HeldOut, HeldOutCorpus, HeldOutPairs, Measure, drawn
from rwkv_dpo.training.wandb_log import WandbLog
from rwkv_dpo.tuning.tuning import Tuning


def build_callbacks(
    settings: RunSettings, data: RunData, identity: Identity, saved: Saved | None, tuning: Tuning | None
) -> list[pl.Callback]:
    """saved: the checkpoint that the run continues from."""
    s, halt, flags = settings, Halt(), settings.as_flags()
    folder, length, chunk_ctx = s.folder.path, s.length, s.batches.chunk_ctx
    scored_at_once, shows_bar = chunk_ctx or 2 * s.data.ctx_len, s.training.enable_progress_bar
    metrics = MetricsLog(length, len(data.pairs) / data.pairs.n_trees if data.pairs else 0, flags, folder, halt)
    checkpoints = Checkpoints(folder, s.saving.epoch_save, s.training.max_bad_steps, length, s.tuning.peft, metrics, tuning, identity)
    callbacks: list[pl.Callback] = [WeightsOfRankZero()] if s.general.is_staged else []
    callbacks += [metrics, checkpoints]
    is_recomputed = s.objective.dpo_ref == "recompute"
    if data.pair_files and is_recomputed:
        callbacks.append(StartIsReference(
            list(data.pair_files.values()), s.devices.precision, scored_at_once, s.devices.wkv_backend, length.epoch_begin > 0, folder,
            halt, shows_bar, s.training.log_every_s, s.objective.dpo_ld_alpha,
        ))  # fmt: skip
    if data.pairs is not None and (is_recomputed or data.pairs.is_scored):
        callbacks.append(ReferenceCheck(data.pairs, s.devices.precision, is_recomputed, chunk_ctx or 4096, s.objective.dpo_ld_alpha))
    reference = None
    if s.objective.dpo_sync_ref:
        reference = MovingReference(
            list(data.pair_files.values()), s.objective.dpo_sync_ref, s.objective.dpo_sync_alpha, scored_at_once, s.objective.dpo_ld_alpha,
            saved.reference if saved else None,
        )  # fmt: skip
        callbacks.append(reference)
    held_out = HeldOut(measures_of(s, data, scored_at_once), length, s.held_out.eval_every, folder, halt, shows_bar)
    callbacks += evaluations(s, data, held_out, checkpoints)
    if s.training.wandb:
        callbacks.append(WandbLog(s.training.wandb, flags, folder, metrics, held_out))
    if s.training.tensorboard:
        callbacks.append(TensorBoardLog(folder, length, metrics, held_out))
    if shows_bar:
        callbacks.append(RunBar(length.total_steps, s.training.log_every_s, metrics))
    callbacks.append(RunReport(folder, about(settings, data), held_out))
    last = LastCheckpoints(s.saving, folder, length, s.general.seed, s.devices.precision == "fp16", metrics, saved, identity, reference)
    return [*callbacks, last, StopOnSignal(halt), Summary(folder, checkpoints, next_commands(settings))]


def measures_of(s: RunSettings, data: RunData, scored_at_once: int) -> list[Measure]:
    """What is evaluated during the run."""
    measures: list[Measure] = []
    if data.valid is not None:
        some = drawn(data.valid, s.held_out.eval_pairs, s.general.seed)
        measures.append(HeldOutPairs(some, mixture_of(s.objective), scored_at_once))
    if data.valid_corpus is not None:
        measures.append(HeldOutCorpus(data.valid_corpus, s.data.ctx_len, s.held_out.eval_windows, scored_at_once))
    return measures


def evaluations(s: RunSettings, data: RunData, held_out: HeldOut, checkpoints: Checkpoints) -> list[pl.Callback]:
    """The callback that evaluates, and those that depend on it; none if there is nothing to do."""
    h, folder, halt = s.held_out, s.folder.path, held_out.halt
    callbacks: list[pl.Callback] = [held_out] if held_out.measures or data.prompts else []
    if h.keep_best or h.early_stop:
        callbacks.append(Best(h.watched(data.valid is not None), held_out, checkpoints, bool(h.keep_best), h.early_stop))
    if data.prompts:
        asked = Prompts(data.prompts, h.sample_tokens, h.sample_temperature, h.sample_top_p, s.general.seed)
        callbacks.append(Samples(asked, held_out, s.length, folder, halt))
    return callbacks


def about(settings: RunSettings, data: RunData) -> About:
    """What the run's page shows that its folder doesn't record."""
    told, files, length = {}, settings.data, settings.length
    for name, pairs, path in (("training", data.pairs, files.dpo_train_file), ("held-out", data.valid, files.dpo_valid_file)):
        if pairs is not None:
            trees = f" in {pairs.n_trees:,} trees" if pairs.n_trees < len(pairs) else ""
            told[f"{name} pairs"] = f"{len(pairs):,}{trees}, of {path}"
    if data.corpus is not None:
        told["corpus"] = f"{data.corpus.n_tokens:,} tokens, of {files.data_file or files.data_type}"
    if data.valid_corpus is not None:
        told["held-out corpus"] = f"{data.valid_corpus.n_tokens:,} tokens, of {files.valid_data_file}"
    total_steps = length.epoch_begin * length.steps_per_epoch + length.total_steps
    title = settings.folder.path.resolve().name or str(settings.folder.path)
    return About(title, "", total_steps, flags=settings.as_flags(), defaults=RunSettings().as_flags(), data=told)


def next_commands(settings: RunSettings) -> list[str]:
    """The commands that compare the trained model with the one it started from, and that make a checkpoint of an adapter."""
    peft, files, folder = settings.tuning.peft, settings.data, settings.folder.path
    base = settings.model.load_model if settings.model.load_model not in ("", "0") else ""
    final = str(folder / saved_name(peft, "final"))
    trained = [base, "--peft_load", final] if peft != "none" else [base, final] if base else [final]
    data = []
    if settings.objective.uses_pairs:
        held_out = Path(files.dpo_train_file).with_name("testset.save")
        data += ["--pairs", str(held_out) if held_out.exists() else files.dpo_valid_file or files.dpo_train_file]
    if files.valid_data_file:
        kind = ["--data_type", files.valid_data_type] if files.valid_data_type else []
        data += ["--data_file", files.valid_data_file, *kind, "--ctx_len", str(files.ctx_len)]
    elif settings.objective.uses_corpus and files.data_type != "dummy":
        data += ["--data_file", files.data_file, "--data_type", files.data_type, "--ctx_len", str(files.ctx_len)]
    commands = [_command("evaluate", "--load_model", *trained, *data)]
    if peft not in ("none", "state"):
        commands.append(_command("export", "--load_model", base, "--peft_load", final, "--out", str(folder / "merged.pth")))
    return commands


def _command(name: str, *arguments: str) -> str:
    path = Path(__file__).resolve().parents[3] / f"{name}.py"
    if not path.exists():  # an installed package has no scripts
        return shlex.join([CONSOLE, name, *arguments])
    here = os.path.relpath(path)
    # The shorter of the two names, in a form that a shell takes for a program.
    return shlex.join([str(path) if here.startswith("../..") else os.path.join(".", here), *arguments])
