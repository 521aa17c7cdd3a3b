"""When last/ is written and how a run goes on from it. A checkpoint of it may come from anyone, as others do: it is looked through
before it is loaded, and fits or is refused."""

import io
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from runs import run_until
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.files.hashed import hashed_write
from rwkv_dpo.run.data import RunData
from rwkv_dpo.run.settings import RunSettings, settings_of
from rwkv_dpo.run.start import by_flags
from rwkv_dpo.run.trainer import loader_of
from rwkv_dpo.run_folder.resume import Progress
from rwkv_dpo.training import last
from rwkv_dpo.training.halt import Halt, Halted
from rwkv_dpo.training.last import LastCheckpoints
from test_resume import flags

# Three epochs of 12 optimizer steps, of 2 micro-batches of 2 samples each.
LONG = settings_of({"epoch_begin": 2, "epoch_steps": 24, "accumulate_grad_batches": 2, "micro_bsz": 2, "epoch_count": 3, "random_seed": 7})


def last_checkpoints(settings: RunSettings = LONG) -> LastCheckpoints:
    s, metrics = settings, SimpleNamespace(stops=False, epoch_losses=[1.0], halt=Halt())
    return LastCheckpoints(s.saving, s.folder.path, s.length, s.general.seed, False, metrics, None, by_flags(s))


@pytest.mark.parametrize("save_every", [0, 1, 5])
@pytest.mark.parametrize("stops", [False, True])
def test_a_run_is_saved_between_steps_and_stops_anywhere_but_after_its_last_step(monkeypatch, save_every, stops):
    """The end of an epoch comes after its last step and what an epoch ends with; the end of the run needs no checkpoint to go on from."""
    callback, saved, stopped = last_checkpoints(settings_of({"epoch_steps": 12, "epoch_count": 3, "save_every": save_every})), [], []
    callback.metrics.stops = stops
    monkeypatch.setattr(callback, "_save", lambda trainer, module: saved.append((trainer.global_step, where)))
    for step in range(1, 37):
        ends = [("step", lambda trainer: callback.on_train_batch_end(trainer, None, None, None, 0))]
        if step % 12 == 0:
            ends.append(("epoch", lambda trainer: callback.on_train_epoch_end(trainer, None)))
        for where, end in ends:
            try:
                end(SimpleNamespace(global_step=step))
            except Halted as halted:
                stopped.append((step, where, halted.message))
    within = [(step, "step") for step in range(1, 36) if step % 12 and (stops or (save_every and step % save_every == 0))]
    assert saved == sorted([*within, (12, "epoch"), (24, "epoch")])
    said = "stopped after step {} of 36; the same command continues (--resume auto)"
    assert stopped == [(step, where, said.format(step)) for step, where in saved if stops]


def test_a_run_goes_on_behind_the_samples_that_it_has_taken_worked_out_by_hand(monkeypatch, tmp_path):
    """Step 18 is 6 steps into the second of its epochs, the fourth of all: step 3 * 12 + 6 = 42, before which 168 samples would have been
    taken had steps always had 2 * 2; 38 more were."""
    counters = []
    monkeypatch.setattr(last, "_set_counters", lambda trainer, *numbers: counters.append(numbers))
    loader = loader_of(LONG, RunData(), 0, on_gpu=False)
    trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(_data_source=SimpleNamespace(instance=loader)), train_dataloader=loader, global_step=18,
    )  # fmt: skip
    progress = Progress(
        identity=by_flags(LONG).as_json(), step=18, samples=206, pairs_seen=100, epoch_losses=[0.5, 0.25], skipped_steps=3, bad_in_a_row=1,
        logs={},
    )  # fmt: skip
    callback = last_checkpoints()
    callback._go_on_from(trainer, progress)
    assert asdict(loader.dataset.samples.position) == {"epoch": 1, "step": 6, "shift": 38}
    assert list(loader.sampler) == list(range(42, 48))
    assert counters == [(1, 6, 18)]
    monkeypatch.setattr(last, "log_sizes", lambda folder: {})
    assert callback._progress(trainer) == progress


@pytest.mark.parametrize(("epoch", "batch", "step"), [(1, 12, 18), (0, 6, 3), (2, 0, 24)])
def test_lightning_counts_on_as_if_it_had_never_stopped(epoch, batch, step):
    """Within an epoch that epoch has begun and isn't done; between two epochs none has begun."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    last._set_counters(trainer, epoch, batch, step)
    begun = epoch + (batch > 0)
    for progress in (trainer.fit_loop.epoch_progress.total, trainer.fit_loop.epoch_progress.current):
        assert asdict(progress) == {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    batches = trainer.fit_loop.epoch_loop.batch_progress
    for progress in (batches.total, batches.current):
        assert asdict(progress) == {"ready": batch, "started": batch, "processed": batch, "completed": batch}
    assert not batches.is_last_batch
    assert trainer.global_step == step


def test_a_rank_that_the_saved_run_had_not_draws_from_a_seed_of_its_own_moment():
    """Else a run that goes on twice would draw the same again."""
    callback = last_checkpoints()
    callback.resumes = True
    strategy = SimpleNamespace(broadcast=lambda known: ({}, [{"cpu": torch.get_rng_state()}], {}))
    trainer = SimpleNamespace(strategy=strategy, optimizers=[None], global_rank=1, global_step=5)
    with torch.random.fork_rng([]):
        callback.on_train_start(trainer, SimpleNamespace(model=torch.nn.Linear(1, 1)))
        assert torch.initial_seed() == 7 + 5


def test_the_generators_of_all_ranks_are_saved_in_their_order(monkeypatch):
    def gather(everyones, mine):
        assert len(everyones) == 2
        everyones[:] = ["of rank 0", mine]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    first, mine = last._all_generators(SimpleNamespace(world_size=2))
    assert first == "of rank 0"
    assert torch.equal(mine["cpu"], torch.get_rng_state())


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    """The newest checkpoint of an interrupted run."""
    folder = tmp_path_factory.mktemp("run") / "out"
    run_until(3, flags(data, folder, dropout=0))
    return max((folder / "last").glob("step-*.pth"), key=lambda path: int(path.stem[5:]))


def resume(data, path: Path, proj_dir: Path):
    train.main(flags(data, proj_dir, dropout=0, resume=path))


def changed(interrupted, path: Path, change) -> Path:
    content = torch.load(interrupted, weights_only=True)
    change(content)
    with hashed_write(path) as file:
        torch.save(content, file)
    return path


def broadcastable(content):
    content["weights"]["emb.weight"] = torch.zeros(1)


def missing(content):
    del content["weights"]["ln_out.bias"]


def more(content):
    content["weights"]["blocks.9.att.key.weight"] = torch.zeros(2, 2)


def other_moment(content):
    content["optimizer"]["emb.weight"]["exp_avg"] = torch.zeros(1)


def moment_of_nothing(content):
    content["optimizer"]["nothing"] = {"exp_avg": torch.zeros(1)}


def no_step(content):
    del content["progress"]["step"]


def no_form(content):
    del content["form"]


def other_form(content):
    content["form"] = 1


def no_weights(content):
    content["weights"] = [1, 2]


@pytest.mark.parametrize(("change", "message"), [
    (broadcastable, r"emb\.weight is \(1,\); this run trains \(61, 32\)"),
    (missing, r"ln_out\.bias is missing; this run trains \(32,\)"),
    (more, r"blocks\.9\.att\.key\.weight is \(2, 2\); this run trains no such weight"),
    (other_moment, r"the optimizer's exp_avg of emb\.weight is \(1,\); the weight is \(61, 32\)"),
    (moment_of_nothing, r"the optimizer's exp_avg of nothing is \(1,\); the weight is missing"),
    (no_step, "not a checkpoint to resume from"),
    (no_form, r"step-3\.pth: not a checkpoint to resume from \('form'\)$"),
    (other_form, "a checkpoint of format 1, of another version; 2 is accepted"),
    (no_weights, "not a checkpoint to resume from"),
])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_name_of_what_is_odd(data, interrupted, tmp_path, change, message):
    path = changed(interrupted, tmp_path / "step-3.pth", change)
    with pytest.raises(InputError, match=message):
        resume(data, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_a_checkpoint_runs_nothing_and_takes_no_more_memory_than_its_file(data, interrupted, tmp_path, capsys):
    path = tmp_path / "step-3.pth"
    with hashed_write(path) as file:
        torch.save({"form": 2, "progress": Evil()}, file)
    with pytest.raises(InputError, match=r"not a readable \.pth file"):
        resume(data, path, tmp_path / "out")
    assert "executed" not in capsys.readouterr().out
    # 8 GB of zeros, in some hundred bytes: a tensor without a storage of its size.
    def huge(content):
        content["weights"]["emb.weight"] = torch.zeros(1).expand(2**31)

    with pytest.raises(InputError, match="tensors that share memory are not accepted"):
        resume(data, changed(interrupted, path, huge), tmp_path / "out")
    # A memo of 2**31 entries: what the scan of pickles sees.
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("archive/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
        members.writestr("archive/version", b"3")
    with hashed_write(path) as file:
        file.write(archive.getvalue())
    with pytest.raises(InputError, match=r"not a readable \.pth file"):
        resume(data, path, tmp_path / "out")
    assert pickle.loads(b"\x80\x02}q\x00.") == {}  # noqa: S301 - the same without the number is a pickle
