"""One run at a time in a run folder."""

import os
import signal
import socket

import pytest
import runs
from lives import records
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.run_folder.lock import RunLock


def test_the_second_start_in_a_folder_says_who_holds_it_and_the_first_goes_on(data, tmp_path, lives):
    out, log = tmp_path / "out", tmp_path / "log.txt"
    wanted = runs.flags(data, out, epoch_steps=4000, epoch_count=1)
    (first,) = lives.start(wanted, log)
    while not (out / "metrics.jsonl").exists():
        assert first.is_alive(), log.read_text()
    for changes in ({}, {"overwrite": 1, "lr_init": 1e-5}, {"resume": "none"}):
        with pytest.raises(InputError, match=rf"another run is using it \(process {first.pid} on {socket.gethostname()}, since 20"):
            train.main(runs.flags(data, out, epoch_steps=4000, epoch_count=1, **changes))
    assert first.is_alive()
    os.kill(first.pid, signal.SIGTERM)
    lives.end([first], log)
    steps = [r["step"] for r in records(out)]
    assert steps == list(range(1, len(steps) + 1))
    assert not (out / ".lock").exists()


def test_death_releases_the_folder(tmp_path):
    """As a process does that is killed: the file stays, its lock goes."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        RunLock(tmp_path).take()
        os.write(writer, b"x")
        signal.pause()
    os.read(reader, 1)
    with RunLock(tmp_path) as lock:
        with pytest.raises(InputError, match=f"process {pid} "):
            lock.take()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert (tmp_path / ".lock").exists()
        lock.take()
    assert not (tmp_path / ".lock").exists()
    os.close(reader)
    os.close(writer)


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with RunLock(tmp_path) as lock, pytest.raises(InputError, match="can't be written to"):
        lock.take()
    assert (tmp_path / "victim").read_text() == "precious"
