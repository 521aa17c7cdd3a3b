"""How a run begins: what rank 0 finds in the run folder, and what it makes of it."""

import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.corpus import Corpus
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.optimizer.state import trainable
from rwkv_dpo.run.config import PILE_EPOCH_WINDOWS, RunConfig
from rwkv_dpo.run_folder.contents import cut_logs, is_finished, newest_epoch, prepare_folder, save_vocabulary, saved_name
from rwkv_dpo.run_folder.identity import Identity
from rwkv_dpo.run_folder.lock import RunLock
from rwkv_dpo.run_folder.resume import Saved, check_fits, choose, goes_on_here, interrupted_stage, last_folder
from rwkv_dpo.tuning.tuning import Tuning

log = logging.getLogger(__name__)


def plan_stage(config: RunConfig) -> RunConfig:
    """RWKV-LM's staged pre-training spelled out: epochs of 40,320 windows; stages 2 and 3 continue from the newest checkpoint."""
    if not config.my_pile_stage:
        return config
    steps = PILE_EPOCH_WINDOWS // (config.micro_bsz * config.world_size)
    config = replace(config, epoch_count=max(config.magic_prime // PILE_EPOCH_WINDOWS, 1), epoch_steps=steps)
    if steps % config.accumulate_grad_batches:
        refuse(f"--accumulate_grad_batches {config.accumulate_grad_batches}: with --my_pile_stage it has to divide {steps}")
    if config.my_pile_stage == 1:
        return config
    if begun := interrupted_stage(config):
        return begun
    folder = Path(config.proj_dir)
    newest = newest_epoch(folder)
    if newest is None:
        refuse(f"--my_pile_stage {config.my_pile_stage}: {folder} holds no rwkv-*.pth; --my_pile_stage 1 makes rwkv-init.pth")
    if newest == -1:
        return replace(config, load_model=str(folder / "rwkv-init.pth"), epoch_begin=0)
    warmup = config.warmup_steps if config.warmup_steps >= 0 else {2: 10, 3: 30}[config.my_pile_stage]
    return replace(config, load_model=str(folder / f"rwkv-{newest}.pth"), epoch_begin=newest + 1, warmup_steps=warmup)


@dataclass(frozen=True)
class Start:
    """identity: the run's. end: why it is over before it began, "" when it isn't. resumes: the checkpoint to go on from, if any."""

    identity: Identity
    end: str = ""
    resumes: Path | None = None


def find_start(config: RunConfig, identity: Identity, lock: RunLock) -> Start:
    """Looks into the run folder, and leaves it as it is. Refuses a folder in which another run is at work."""
    folder = Path(config.proj_dir)
    if folder.is_dir():
        lock.take()
    if config.resume == "auto" and not config.overwrite and is_finished(config, identity):
        shutil.rmtree(last_folder(config), ignore_errors=True)
        return Start(identity, f"{folder} holds the end of this run ({saved_name(config, 'final')}); --resume none trains it again")
    return Start(identity, resumes=choose(config, identity))


def begin_folder(
    config: RunConfig, start: Start, lock: RunLock, saved: Saved | None, model: RWKV, is_new: bool, corpus: Corpus | None,
    tuning: Tuning | None,
) -> None:  # fmt: skip
    """What a run writes before its first step. saved: the checkpoint that it goes on from; is_new: the model has initial weights. Where
    --peft starts is saved too: it is the reference, and what PiSSA took out of the matrices."""
    if saved is not None:
        check_fits(saved, dict(trainable(model)))
    folder = Path(config.proj_dir)
    prepare_folder(config, start.identity, lock, resumes=goes_on_here(config, start.resumes))
    if saved is not None and goes_on_here(config, start.resumes):
        cut_logs(folder, saved.progress.logs)
    if is_new:
        save_weights(model.state_dict(), folder / "rwkv-init.pth")
    if corpus is not None and corpus.characters:
        save_vocabulary(corpus.characters, folder / "vocab.json")
    if tuning is not None:
        tuning.save(dict(trainable(model)), folder, "init")
