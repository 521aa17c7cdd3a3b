"""SIGTERM and Ctrl-C, as real signals to real processes: a run ends well, or says that it did not."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
from lives import hang, steps_written, wait_for_hang, wait_until
from runs import environment
from rwkv_dpo.commands import train
from rwkv_dpo.training.halt import Halt, StopOnSignal

flags = functools.partial(runs.flags, epoch_steps=300, epoch_count=1, dropout=0.1)


def load_as_on_a_gpu() -> None:
    """Batches come as they do on a GPU."""
    from rwkv_dpo.run import trainer

    build = trainer.build_loader
    trainer.build_loader = lambda dataset, epoch_begin, epoch_steps, on_gpu: build(dataset, epoch_begin, epoch_steps, on_gpu=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_gpu_run_saves_and_ends_well(data, tmp_path, lives, number):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    (process,) = lives.start(flags(data, out), log, prepare=load_as_on_a_gpu)
    wait_until(lambda: steps_written(out) >= 3, [process], log)
    os.killpg(process.pid, number)
    assert lives.end([process], log) == [0], log.read_text()
    assert "the same command continues (--resume auto)" in log.read_text()
    assert 3 <= steps_written(out) < 300
    assert [path.name for path in (out / "last").iterdir() if path.suffix == ".pth"] == [f"step-{steps_written(out)}.pth"]


PHASES = {
    "loading": ("rwkv_dpo.run.data:open_pairs", 1),
    "scoring the reference": ("rwkv_dpo.training.reference:score_batch", 2),
    "the check before the first step": ("rwkv_dpo.training.reference_check:score_pairs", 1),
}
STOPPED = "no step was finished and nothing was saved; the same command starts again"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_before_the_first_step_ends_the_run_at_once_and_says_so(data, tmp_path, lives, phase, number, status):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    wanted = flags(data, out, dpo_ref="recompute", ctx_len=16, data_file=None, dpo_general_corpus_ratio=0)
    processes = lives.start(wanted, log, prepare=functools.partial(hang, *PHASES[phase]))
    wait_for_hang(processes, log)
    os.killpg(processes[0].pid, number)
    assert lives.end(processes, log) == [status], log.read_text()
    said = {130: "Ctrl-C", 143: "SIGTERM"}[status]
    assert log.read_text().endswith(f": stopped by {said}: {STOPPED}\n")
    assert "Traceback" not in log.read_text()
    assert not list(out.glob("*.pth"))
    assert not (out / "last").exists()


def slow_first_step() -> None:
    from rwkv_dpo.training.module import DPOModule

    step = DPOModule.training_step

    def slow(self, batch, batch_idx):
        if not batch_idx:
            os.write(1, b"HANGING\n")
            time.sleep(0.5)
        return step(self, batch, batch_idx)

    DPOModule.training_step = slow


def test_a_signal_in_the_first_step_saves_it(data, tmp_path, lives):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    processes = lives.start(flags(data, out), log, prepare=slow_first_step)
    wait_for_hang(processes, log)
    os.killpg(processes[0].pid, signal.SIGTERM)
    assert lives.end(processes, log) == [0], log.read_text()
    assert (out / "last" / "step-1.pth").exists()


LAUNCHED = """
import functools, os, sys
sys.path[:0] = [{sources!r}, {tests!r}]
import lives
from rwkv_dpo.commands import train
{patch}
train.run(sys.argv[1:])
"""


def launch(data, tmp_path, patch, **changes) -> tuple[subprocess.Popen, dict[str, int]]:
    """Two processes as train.py starts them itself; the numbers of both, by their LOCAL_RANK, once they write them."""
    script, log = tmp_path / "patched_train.py", tmp_path / "log.txt"
    script.write_text(LAUNCHED.format(sources=str(Path(train.__file__).parents[2]), tests=os.path.dirname(runs.__file__), patch=patch))
    wanted = flags(data, tmp_path / "out", devices=2, strategy="ddp", dpo_ref="recompute", **changes)
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, script, *wanted], env=environment(), stdout=file, stderr=file, start_new_session=True)
    started = time.monotonic()
    while log.read_text().count("HANGING ") < 2:
        time.sleep(0.05)
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < started + 200, log.read_text()
    told = [line.split() for line in log.read_text().splitlines() if line.startswith("HANGING ")]
    return process, {rank: int(number) for _, rank, number in told}


def is_alive(number: int) -> bool:
    try:
        with open(f"/proc/{number}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


HANG_WHILE_SCORING = """
from rwkv_dpo.training import reference
def hang(*arguments):
    import time
    os.write(1, f"HANGING {os.environ.get('LOCAL_RANK', '0')} {os.getpid()}\\n".encode())
    time.sleep(600)
reference.score_batch = hang
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_to_one_of_the_processes_that_train_py_has_started_ends_both(data, tmp_path, rank):
    process, numbers = launch(data, tmp_path, HANG_WHILE_SCORING)
    os.kill(numbers[rank], signal.SIGTERM)
    assert process.wait(60) == 143
    log = (tmp_path / "log.txt").read_text()
    assert log.endswith(f"patched_train.py: stopped by SIGTERM: {STOPPED}\n")
    assert log.count("stopped by") == 1
    assert "Traceback" not in log
    ends = time.monotonic() + 30
    while any(map(is_alive, numbers.values())):
        time.sleep(0.05)
        assert time.monotonic() < ends, log


def test_what_ends_at_once_ends_the_processes_that_it_started():
    child = subprocess.Popen(["sleep", "600"])
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[child])))
    StopOnSignal(Halt())._pass_on(trainer, signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
