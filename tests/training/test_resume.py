"""A run that dies, and goes on as if it had not."""

import functools
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch
from lives import records, steps_written
from runs import run_to, run_until
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.files.hashed import fault_of
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.run.settings import RunSettings, settings_of
from rwkv_dpo.run.start import by_flags, interrupted_stage
from rwkv_dpo.run_folder.lock import RunLock
from rwkv_dpo.run_folder.resume import Progress, Saved, check_fits, choose, goes_on_here, save, start_of

N_STEPS = 24
TWO = {"devices": 2, "strategy": "ddp"}
# Two epochs of 12 optimizer steps, of 2 micro-batches each, with dropout.
flags = functools.partial(runs.flags, dpo_valid_file="DATA/valid.save", epoch_steps=24, accumulate_grad_batches=2, dropout=0.1,
                          warmup_steps=5, weight_decay=0.1)  # fmt: skip
NOTHING = {"weights": {}, "optimizer": {}, "generators": [], "scaler": {}}


def progress_of(settings: RunSettings, step: int) -> Progress:
    return Progress(by_flags(settings).as_json(), step, samples=0, pairs_seen=0, epoch_losses=[], skipped_steps=0, bad_in_a_row=0, logs={})


def write_config(settings: RunSettings) -> None:
    (settings.folder.path / "config.json").write_text(as_json(by_flags(settings).as_json()))


def chosen(settings: RunSettings) -> Path | None:
    return choose(settings.folder, by_flags(settings), settings.length, settings.continues)


def test_a_run_goes_on_from_a_checkpoint_within_its_steps_alone(tmp_path):
    settings = settings_of({"proj_dir": str(tmp_path), "epoch_steps": 4, "epoch_count": 2})
    assert chosen(settings) is None
    (tmp_path / "last").mkdir()
    path = save(tmp_path / "last", progress_of(settings, 5), NOTHING, keep=2)
    assert chosen(settings) == path
    shorter = settings.with_flags(epoch_count=1, overwrite=1)
    with pytest.raises(InputError, match=r"step-5\.pth has done 5 steps; with these settings the run ends at 4$"):
        chosen(shorter)
    path = save(tmp_path / "last", progress_of(settings, 4), NOTHING, keep=1)
    assert chosen(settings) == path
    with pytest.raises(InputError, match=r"step-4\.pth has done 4 steps; with these settings the run ends at 4$"):
        chosen(shorter)
    path = save(tmp_path / "last", progress_of(settings, 3), NOTHING, keep=1)
    assert chosen(shorter) == path


def test_of_many_other_settings_five_are_named(tmp_path):
    settings = settings_of({"proj_dir": str(tmp_path), "epoch_steps": 4, "epoch_count": 2})
    save(tmp_path / "last", progress_of(settings, 5), NOTHING, keep=2)
    others = {"dpo_beta": 0.5, "ctx_len": 7, "lr_init": 0.25, "lr_final": 0.5, "beta1": 0.5, "beta2": 0.5, "keep": 9}
    with pytest.raises(InputError, match="is of a run with other settings: ") as error:
        chosen(settings.with_flags(**others))
    named = str(error.value).split("other settings: ")[1].removesuffix("; --resume none starts a fresh run")
    assert named.split(", ") == [
        "--ctx_len 7 (was 1024)", "--dpo_beta 0.5 (was 0.01)", "--lr_init 0.25 (was 0.0006)", "--lr_final 0.5 (was 1e-05)",
        "--beta1 0.5 (was 0.9)",
    ]  # fmt: skip


def test_an_interrupted_run_is_left_behind_only_by_what_continues_it_or_may_overwrite_it(tmp_path):
    before = settings_of({"proj_dir": str(tmp_path)})
    write_config(before)
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "step-5.pth").touch()
    goes_on = {"load_model": "rwkv-2.pth", "epoch_begin": 3, "warmup_steps": 7}
    assert chosen(before.with_flags(**goes_on)) is None
    assert chosen(before.with_flags(lr_init=0.5, overwrite=1)) is None
    for changes in ({}, {"lr_init": 0.5}, {"load_model": "rwkv-2.pth"}, {**goes_on, "lr_init": 0.5}, {"micro_bsz": 3, "overwrite": 1}):
        with pytest.raises(InputError, match="all of its checkpoints are damaged"):
            chosen(before.with_flags(**changes))
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="all of its checkpoints are damaged"):
        chosen(before.with_flags(lr_init=0.5, overwrite=1))


def test_a_checkpoint_is_gone_on_from_here_when_it_is_of_the_folders_own_last(tmp_path):
    for name in "abc":
        (tmp_path / name / "last").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    settings = settings_of({"proj_dir": str(tmp_path / "b")})
    paths = {name: tmp_path / name / "last" / "step-1.pth" for name in ("a", "b", "c", "link")}
    assert {name: goes_on_here(settings.folder, path) for name, path in paths.items()} == {"a": False, "b": True, "c": False, "link": True}
    assert not goes_on_here(settings.folder, None)


def test_a_stage_that_was_interrupted_begins_where_it_had_begun(tmp_path):
    begun = settings_of({"proj_dir": str(tmp_path), "my_pile_stage": 3, "load_model": "rwkv-2.pth", "epoch_begin": 3, "warmup_steps": 30})
    now = begun.with_flags(load_model="", epoch_begin=0, warmup_steps=-1)
    write_config(begun)
    assert interrupted_stage(now) is None  # it had saved nothing
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "step-5.pth").touch()
    assert interrupted_stage(now) == begun
    assert interrupted_stage(now.with_flags(micro_bsz=7, keep=3)) == begun.with_flags(micro_bsz=7, keep=3)
    for changes in ({"resume": "none"}, {"resume": "/elsewhere/step-5.pth"}, {"lr_init": 0.5}):
        assert interrupted_stage(now.with_flags(**changes)) is None
    (tmp_path / "config.json").unlink()
    assert interrupted_stage(now) is None


def test_an_adapters_start_is_beside_the_last_that_its_checkpoint_is_in():
    def saved(peft: str) -> Saved:
        return Saved(Path("out/last/step-5.pth"), replace(progress_of(settings_of({}), 5), identity={"peft": peft}), {}, {}, [], {})

    starts = {peft: start_of(saved(peft)) for peft in ("none", "state", "lora", "dora", "pissa", "rslora")}
    assert starts == {"none": "", "state": "", **dict.fromkeys(("lora", "dora", "pissa", "rslora"), "out/adapter-init")}
    assert start_of(None) == ""


def test_an_8_bit_optimizers_tables_have_sizes_of_their_own(tmp_path):
    """Its name is read from a file; what belongs to no weight is refused all the same."""

    def saved(optim: str, name: str) -> Saved:
        progress = replace(progress_of(settings_of({}), 5), identity={"optim": optim})
        states = {name: {"state1": torch.zeros(6), "absmax1": torch.zeros(1), "step": 5.0}}
        return Saved(tmp_path / "step-5.pth", progress, {"w": torch.zeros(2, 3)}, states, [], {})

    trained = {"w": torch.ones(2, 3)}
    check_fits(saved("".join(["adamw", "8bit"]), "w"), trained)
    with pytest.raises(InputError, match=r"the optimizer's state1 of w is \(6,\); the weight is \(2, 3\)"):
        check_fits(saved("adamw", "w"), trained)
    with pytest.raises(InputError, match=r"the optimizer's state1 of v is \(6,\); the weight is missing"):
        check_fits(saved("adamw8bit", "v"), trained)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train.main(flags(data, folder))
    return folder


@pytest.fixture(scope="module")
def lived(data, lives, tmp_path_factory):
    """The like, by lives of one thread: of one process, or of two."""

    @functools.cache
    def trained(world_size):
        folder = tmp_path_factory.mktemp("lived")
        lives.trained(flags(data, folder / "out", **(TWO if world_size == 2 else {})), folder / "log.txt", world_size)
        return folder / "out"

    return trained


def assert_same(folder, whole):
    assert records(folder) == records(whole)
    assert [r["step"] for r in records(folder)] == list(range(1, N_STEPS + 1))
    assert (folder / "valid.jsonl").read_text() == (whole / "valid.jsonl").read_text()
    for name in ("rwkv-0.pth", "rwkv-1.pth", "rwkv-final.pth"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert not (folder / "last").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "save_every", "kills", "seed"), [(1, 1, 8, 0), (1, 3, 6, 1), (2, 1, 5, 2), (2, 2, 4, 3)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(data, tmp_path, lives, lived, world_size, save_every, kills, seed):
    """23 kills in all, fewer where a busy machine sees a run's end first: SIGKILL some steps into each life, at every other one in the
    middle of a save."""
    wanted = flags(data, tmp_path / "out", save_every=save_every, **(TWO if world_size == 2 else {}))
    fell_into = lives.killed(wanted, tmp_path / "out", tmp_path / "log.txt", random.Random(seed), world_size, kills)
    assert len(fell_into) > kills // 2
    assert "save" in fell_into
    assert_same(tmp_path / "out", lived(world_size))


@pytest.mark.parametrize("step", [5, 12, 13])
def test_sigterm_saves_and_exits_well_and_the_same_command_goes_on(data, tmp_path, whole, caplog, step):
    caplog.set_level("INFO")
    run_until(step, flags(data, tmp_path / "out"))
    assert "the same command continues (--resume auto)" in caplog.text
    assert not (tmp_path / "out" / "rwkv-final.pth").exists()
    assert steps_written(tmp_path / "out") < N_STEPS
    train.main(flags(data, tmp_path / "out"))
    assert "continuing after step" in caplog.text
    assert_same(tmp_path / "out", whole)


def test_ctrl_c_is_the_same(data, tmp_path, whole):
    run_until(5, flags(data, tmp_path / "out"), lambda: os.kill(os.getpid(), signal.SIGINT))
    train.main(flags(data, tmp_path / "out"))
    assert_same(tmp_path / "out", whole)


def test_fp16_goes_on_with_its_loss_scale(data, tmp_path):
    fp16 = {"precision": "fp16", "dpo": 0, "lr_init": 1e-4}
    train.main(flags(data, tmp_path / "whole", **fp16))
    run_until(5, flags(data, tmp_path / "out", **fp16))
    train.main(flags(data, tmp_path / "out", **fp16))
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_stops_both_at_the_same_step(data, tmp_path, lives, lived):
    log = tmp_path / "log.txt"
    for rank in (0, 1):
        processes = lives.start(flags(data, tmp_path / "out", **TWO), log, 2)
        begin = steps_written(tmp_path / "out")
        while steps_written(tmp_path / "out") < begin + 3:
            time.sleep(0.001)
            assert all(run.is_alive() for run in processes), log.read_text()
        os.kill(processes[rank].pid, signal.SIGTERM)
        assert lives.end(processes, log) == [0, 0], log.read_text()
    assert log.read_text().count("the same command continues") == 2
    lives.trained(flags(data, tmp_path / "out", **TWO), log, 2)
    assert_same(tmp_path / "out", lived(2))


def test_a_run_of_other_samples_a_step_goes_on_right_after_the_samples_taken(data, tmp_path):
    """8 steps of 4 pairs, then steps of 6 pairs: 32 + 6 are the first 38 of the sequence, each pass of which has 10."""
    run_until(8, flags(data, tmp_path / "out", dropout=0))
    step = len(records(tmp_path / "out"))
    train.main(flags(data, tmp_path / "out", dropout=0, micro_bsz=3))
    got = records(tmp_path / "out")
    assert [r["step"] for r in got] == list(range(1, N_STEPS + 1))
    assert [r["pairs_seen"] for r in got] == [4 * s if s <= step else 4 * step + 6 * (s - step) for s in range(1, N_STEPS + 1)]


def test_none_begins_anew_and_a_path_goes_on_elsewhere(data, tmp_path, whole, stopped):
    shutil.copytree(stopped, tmp_path / "out")
    saved, step = tmp_path / "out" / "last" / "step-10.pth", 10
    train.main(flags(data, tmp_path / "elsewhere", resume=saved))
    assert records(tmp_path / "elsewhere") == records(whole)[step:]
    assert (tmp_path / "elsewhere" / "rwkv-final.pth").read_bytes() == (whole / "rwkv-final.pth").read_bytes()
    train.main(flags(data, tmp_path / "out", resume="none"))
    assert records(tmp_path / "out") == records(whole)
    earlier = tmp_path / "out" / "earlier-1"
    assert (earlier / "last" / saved.name).exists()
    assert len((earlier / "metrics.jsonl").read_text().splitlines()) == step


def test_a_finished_run_is_not_trained_again_unless_asked_to(data, tmp_path, caplog):
    short = {"epoch_steps": 4, "epoch_count": 1}
    train.main(flags(data, tmp_path, **short))
    before = (tmp_path / "rwkv-final.pth").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        train.main(flags(data, tmp_path, **short))
    assert "holds the end of this run (rwkv-final.pth); --resume none trains it again" in caplog.text
    assert (tmp_path / "rwkv-final.pth").stat().st_mtime_ns == before
    for changes in ({"resume": "none"}, {"overwrite": 1}):
        train.main(flags(data, tmp_path, **short, **changes))
    assert sorted(path.parent.name for path in tmp_path.glob("*/metrics.jsonl")) == ["earlier-1", "earlier-2"]


def test_other_settings_are_not_resumed(data, tmp_path, stopped):
    shutil.copytree(stopped, tmp_path / "out")
    with pytest.raises(InputError, match=r"other settings: --lr_init 0\.002 \(was 0\.001\)"):
        train.main(flags(data, tmp_path / "out", lr_init=2e-3))
    with pytest.raises(InputError, match=r"--epoch_steps 26: .* counts 12 optimizer steps per epoch; 24 is accepted"):
        train.main(flags(data, tmp_path / "out", epoch_steps=26))
    train.main(flags(data, tmp_path / "out", lr_init=2e-3, overwrite=1, epoch_count=1, epoch_steps=2))
    assert [r["step"] for r in records(tmp_path / "out")] == [1]


def test_save_every_and_keep_say_what_is_in_last(data, tmp_path):
    run_until(11, flags(data, tmp_path / "out", save_every=2, keep=3))
    names = sorted(path.name for path in (tmp_path / "out" / "last").iterdir())
    steps = sorted(int(name.removeprefix("step-").removesuffix(".pth")) for name in names if name.endswith(".pth"))
    assert steps[-1] >= 11
    assert len(steps) == 3
    assert all(step % 2 == 0 for step in steps[:-1])
    assert names == sorted(f"step-{step}.pth{end}" for step in steps for end in ("", ".sha256"))


def test_hashes_are_those_of_sha256sum(data, whole):
    subprocess.run(["sha256sum", "--check", "--strict", *(path.name for path in whole.glob("*.sha256"))], cwd=whole, check=True)
    assert len(list(whole.glob("*.sha256"))) == len(list(whole.glob("*.pth"))) == 3


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """A run with two checkpoints in last/, which no test changes."""
    folder = tmp_path_factory.mktemp("stopped") / "out"
    run_to(10, flags(data, folder, save_every=2))
    return folder


@pytest.mark.parametrize("damage", ["flip", "cut", "no hash"])
def test_a_corrupt_checkpoint_is_reported_and_the_one_before_is_used(data, tmp_path, whole, stopped, caplog, damage):
    shutil.copytree(stopped, tmp_path / "out")
    before, newest = sorted((tmp_path / "out" / "last").glob("step-*.pth"), key=lambda path: int(path.stem[5:]))
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    elif damage == "cut":
        newest.write_bytes(content[: len(content) // 2])
    else:
        newest.with_name(f"{newest.name}.sha256").unlink()
    with caplog.at_level("INFO"):
        train.main(flags(data, tmp_path / "out"))
    assert f"{newest.name} {'has no .sha256' if damage == 'no hash' else 'does not have the sha256'}" in caplog.text
    assert f"from {before}" in caplog.text
    assert_same(tmp_path / "out", whole)


def test_when_no_checkpoint_is_whole_the_run_is_refused(data, tmp_path, stopped):
    shutil.copytree(stopped, tmp_path / "out")
    for path in (tmp_path / "out" / "last").glob("*.pth"):
        path.write_bytes(b"torn")
        with pytest.raises(InputError, match=r"--resume .*step-\d+.pth: does not have the sha256"):
            train.main(flags(data, tmp_path / "out", resume=path))
    with pytest.raises(InputError, match=r"last: all of its checkpoints are damaged \(step-.*--resume none starts a fresh run"):
        train.main(flags(data, tmp_path / "out"))
    with pytest.raises(InputError, match=r"--resume nowhere.pth: no such checkpoint"):
        train.main(flags(data, tmp_path / "out", resume="nowhere.pth"))


@pytest.fixture
def small_disk(mount_disk):
    """A folder with room for three checkpoints and a half."""
    return mount_disk(1200)


def test_a_full_disk_stops_the_run_and_the_last_good_checkpoint_is_named_and_intact(data, small_disk, tmp_path, whole):
    out = small_disk / "out"
    with pytest.raises(InputError, match=r"cannot be written: No space left on device; the last good checkpoint is \S+$") as error:
        train.main(flags(data, out, save_every=2, keep=9))
    assert "\n" not in str(error.value)
    named = str(error.value).rsplit(" ", 1)[1]
    assert fault_of(named) == ""
    assert not list(out.glob("**/.*"))
    # With room again, the same command continues.
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    train.main(flags(data, out, save_every=2))
    assert_same(out, whole)


@pytest.mark.slow
def test_a_full_disk_stops_both_processes_with_one_line(data, small_disk, lives, tmp_path):
    log = tmp_path / "log.txt"
    wanted = flags(data, small_disk / "out", save_every=2, keep=9, **TWO)
    assert lives.whole(wanted, log, 2) == [2, 0], log.read_text()
    assert log.read_text().count("No space left on device; the last good checkpoint is") == 1
    assert "Traceback" not in log.read_text()


def test_a_folder_that_becomes_read_only_stops_the_run_likewise(data, small_disk, whole, monkeypatch):
    # The run's lock is open for writing, and would keep `mount` from doing what a failing disk does.
    monkeypatch.setattr(RunLock, "take", lambda self: None)
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    out = small_disk / "out"

    def lock():
        while subprocess.run(["mount", "-o", "remount,ro", small_disk], capture_output=True).returncode:
            time.sleep(0.001)  # busy while a file is open for writing

    with pytest.raises(InputError, match=r"cannot be written: Read-only file system; the last good checkpoint is \S+$") as error:
        run_until(4, flags(data, out, save_every=2), lock)
    assert fault_of(str(error.value).rsplit(" ", 1)[1]) == ""
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    train.main(flags(data, out))
    assert_same(out, whole)


def test_staged_pretraining_goes_on_within_its_epoch(data, tmp_path):
    stage = {
        "load_model": None, "dpo": 0, "dpo_valid_file": None, "vocab_size": 61, "n_layer": 1, "n_embd": 32, "head_size_a": 32,
        "ctx_len": 2, "micro_bsz": 2016, "magic_prime": 1997, "epoch_count": 999, "accumulate_grad_batches": 1, "my_pile_stage": 3,
    }  # fmt: skip
    for name in ("whole", "out"):
        train.main(flags(data, tmp_path / name, **stage | {"my_pile_stage": 1}))
    train.main(flags(data, tmp_path / "whole", **stage))
    run_until(5, flags(data, tmp_path / "out", **stage))
    assert steps_written(tmp_path / "out") < 20
    train.main(flags(data, tmp_path / "out", **stage))
    assert records(tmp_path / "out") == records(tmp_path / "whole")
    assert (tmp_path / "out" / "rwkv-final.pth").read_bytes() == (tmp_path / "whole" / "rwkv-final.pth").read_bytes()
