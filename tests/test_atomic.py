"""Atomic writing: the old file or the new one, never half of either."""

import os
import subprocess
import sys

import pytest
from rwkv_dpo.atomic import atomic_folder, atomic_write
from rwkv_dpo.errors import InputError


def test_the_file_appears_whole_and_alone(tmp_path):
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"new")
        assert not (tmp_path / "a.bin").exists()
    assert (tmp_path / "a.bin").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"old")

    def fail_halfway():
        with atomic_write(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".a[1].bin.{ended.pid}.part").write_bytes(b"half")
    others = [f".a[1].bin.{os.getppid()}.part", f".b.bin.{ended.pid}.part", ".a[1].bin.x.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"half")
    with atomic_write(tmp_path / "a[1].bin") as file:
        file.write(b"new")
    assert sorted(os.listdir(tmp_path)) == sorted(["a[1].bin", *others])


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_folder_that_cannot_be_written_to_is_one_line_with_its_path(tmp_path, parent):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=rf"{parent}/a.bin: cannot be written: \w+"), atomic_write(tmp_path / parent / "a.bin"):
        pass


def test_a_full_disk_is_an_input_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    def write_to_full_disk():
        with atomic_write("unused.bin"), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")

    with pytest.raises(InputError, match=r"unused.bin: cannot be written: No space left"):
        write_to_full_disk()
    assert not os.path.exists("unused.bin")


def test_a_folder_appears_whole_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path):
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "run") as unfinished:
            (unfinished / text).write_text(text)
            assert not (tmp_path / "run" / text).exists()
        assert [p.name for p in (tmp_path / "run").iterdir()] == [text]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_fails_halfway_leaves_the_old_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("old")

    def fail():
        with atomic_folder(tmp_path / "run") as unfinished:
            (unfinished / "new").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none/run: cannot be written"), atomic_folder(tmp_path / "none" / "run"):
        pass
