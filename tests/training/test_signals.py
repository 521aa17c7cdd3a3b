"""SIGTERM and Ctrl-C, as real signals to real processes: a run ends well, or says that it did not."""

import os
import signal
import time

import pytest
import runs
from runs import TINY, write_inputs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_inputs(folder, TINY, 30)
    return folder


def flags(data, proj_dir, **changes) -> list[str]:
    return runs.flags(data, proj_dir, **{"epoch_steps": 300, "epoch_count": 1, "dropout": 0.1, **changes})


def steps_written(folder) -> int:
    return (folder / "metrics.jsonl").read_bytes().count(b"\n") if (folder / "metrics.jsonl").exists() else 0


def wait_until(is_so, processes, log) -> None:
    while not is_so():
        time.sleep(0.002)
        assert all(process.is_alive() for process in processes), log.read_text()


def load_as_on_a_gpu() -> None:
    """Batches come as they do on a GPU."""
    from rwkv_dpo.training import trainer

    build = trainer.build_loader
    trainer.build_loader = lambda config, corpus, pairs, rank, on_gpu: build(config, corpus, pairs, rank, on_gpu=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_gpu_run_saves_and_ends_well(data, tmp_path, lives, number):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    (process,) = lives.start(flags(data, out), log, prepare=load_as_on_a_gpu)
    wait_until(lambda: steps_written(out) >= 3, [process], log)
    os.killpg(process.pid, number)
    assert lives.end([process], log) == [0], log.read_text()
    assert "the same command goes on (--resume auto)" in log.read_text()
    assert 3 <= steps_written(out) < 300
    assert [path.name for path in (out / "last").iterdir() if path.suffix == ".pth"] == [f"step-{steps_written(out)}.pth"]
