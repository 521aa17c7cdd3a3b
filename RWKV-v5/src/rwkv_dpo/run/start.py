"""How a run begins: what rank 0 finds in the run folder, and what it does with it."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.corpus import corpus_sha256
from rwkv_dpo.data.pairs import content_sha256
from rwkv_dpo.files.hashed import path_sha256
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.run.data import RunData
from rwkv_dpo.run.rules import PILE_EPOCH_WINDOWS, check_trains
from rwkv_dpo.run.settings import PARTS, RunSettings
from rwkv_dpo.run_folder.contents import cut_logs, is_finished, newest_epoch, prepare_folder, read_identity, save_vocabulary, saved_name
from rwkv_dpo.run_folder.identity import Identity
from rwkv_dpo.run_folder.lock import RunLock
from rwkv_dpo.run_folder.resume import Saved, check_fits, checkpoints_in, choose, goes_on_here, last_of
from rwkv_dpo.settings.fields import Part
from rwkv_dpo.training.optimizer_state import trainable
from rwkv_dpo.tuning.tuning import Tuning

log = logging.getLogger(__name__)


def plan_stage(settings: RunSettings) -> RunSettings:
    """RWKV-LM's staged pre-training in terms of other settings: epochs of 40,320 windows; stages 2 and 3 continue from the newest
    checkpoint."""
    stage, accumulated = settings.general.my_pile_stage, settings.epochs.accumulate_grad_batches
    if not stage:
        return settings
    steps = PILE_EPOCH_WINDOWS // settings.length.samples
    settings = settings.with_flags(epoch_count=max(settings.batches.magic_prime // PILE_EPOCH_WINDOWS, 1), epoch_steps=steps)
    if steps % accumulated:
        refuse(f"--accumulate_grad_batches {accumulated}: with --my_pile_stage it has to divide {steps}")
    if stage == 1:
        return settings
    settings = interrupted_stage(settings) or _next_stage(settings)
    check_trains(settings)
    return settings


def interrupted_stage(settings: RunSettings) -> RunSettings | None:
    """The settings with the epoch and the weights with which an interrupted run with these settings had begun; None if there is none."""
    if settings.folder.resume != "auto" or not checkpoints_in(last_of(settings.folder.path)):
        return None
    before = read_identity(settings.folder.path)
    if before is None:
        return None
    begun = {name: before.flags[name] for name in ("load_model", "epoch_begin", "warmup_steps") if name in before.flags}
    # The files are not opened yet: they are compared once they are.
    if by_flags(settings).changes_from(before, {Part.INCIDENTAL, Part.LAYOUT}, free_flags=begun):
        return None
    return settings.with_flags(**begun)


def _next_stage(settings: RunSettings) -> RunSettings:
    stage, folder, warmup = settings.general.my_pile_stage, settings.folder.path, settings.optimizer.warmup_steps
    newest = newest_epoch(folder)
    if newest is None:
        refuse(f"--my_pile_stage {stage}: {folder} holds no rwkv-*.pth; --my_pile_stage 1 makes rwkv-init.pth")
    if newest == -1:
        return settings.with_flags(load_model=str(folder / "rwkv-init.pth"), epoch_begin=0)
    warmup = warmup if warmup >= 0 else {2: 10, 3: 30}[stage]
    return settings.with_flags(load_model=str(folder / f"rwkv-{newest}.pth"), epoch_begin=newest + 1, warmup_steps=warmup)


def by_flags(settings: RunSettings) -> Identity:
    """Known by flags and paths alone."""
    return Identity(settings.as_flags(), {}, PARTS)


def identity_of(settings: RunSettings, data: RunData) -> Identity:
    """Reads the checkpoint once, and a sample of a large corpus."""
    load_model, peft_load = settings.model.load_model, settings.tuning.peft_load
    with_scores = settings.objective.dpo_ref == "file"
    content = {
        "load_model": path_sha256(load_model) if load_model and settings.general.my_pile_stage != 1 else "",
        "peft_load": path_sha256(peft_load) if peft_load else "",
        "data_file": corpus_sha256(data.corpus) if data.corpus else "",
        "dpo_train_file": content_sha256(data.pairs, with_scores) if data.pairs is not None else "",
        "dpo_valid_file": content_sha256(data.valid, with_scores) if data.valid is not None else "",
        "valid_data_file": corpus_sha256(data.valid_corpus) if data.valid_corpus else "",
        "sample_prompts": path_sha256(settings.held_out.sample_prompts) if settings.held_out.sample_prompts else "",
        # In addition to the contents of the files: this tells evaluate.py which pairs were held out from the run.
        **{name: str(data.pairs.header.get(name, "")) if data.pairs is not None else "" for name in ("source_id", "preparation_id")},
    }
    return Identity(settings.as_flags(), content, PARTS)


@dataclass(frozen=True)
class Start:
    """identity: the run's. end: why it is over before it began, "" if it isn't. resumes: the checkpoint to continue from, if any."""

    identity: Identity
    end: str = ""
    resumes: Path | None = None


def find_start(settings: RunSettings, identity: Identity, lock: RunLock) -> Start:
    """Look into the run folder without changing it. Refuses a folder that another run is using."""
    folder, final = settings.folder, saved_name(settings.tuning.peft, "final")
    if folder.path.is_dir():
        lock.take()
    if folder.resume == "auto" and not folder.overwrite and is_finished(folder.path / final, identity, settings.length.total_steps):
        if not settings.held_out.early_stop:
            shutil.rmtree(last_of(folder.path), ignore_errors=True)
        return Start(identity, f"{folder.path} holds the end of this run ({final}); --resume none trains it again")
    return Start(identity, resumes=choose(folder, identity, settings.length, settings.continues))


def begin_folder(
    settings: RunSettings, start: Start, lock: RunLock, saved: Saved | None, model: RWKV, is_new: bool, data: RunData,
    tuning: Tuning | None,
) -> None:  # fmt: skip
    """What a run writes before its first step. saved: the checkpoint that it continues from; is_new: the model has initial weights. The
    starting point of --peft is saved too: it is the reference, and includes what PiSSA took out of the matrices."""
    if saved is not None:
        check_fits(saved, dict(trainable(model)))
    folder, corpus = settings.folder.path, data.corpus
    resumes = goes_on_here(settings.folder, start.resumes)
    prepare_folder(settings.folder, start.identity, lock, resumes, settings.continues)
    if saved is not None and resumes:
        cut_logs(folder, saved.progress.logs)
    if is_new:
        save_weights(model.state_dict(), folder / "rwkv-init.pth")
    if corpus is not None and corpus.characters:
        save_vocabulary(corpus.characters, folder / "vocab.json")
    if tuning is not None:
        tuning.save(dict(trainable(model)), folder, "init")
