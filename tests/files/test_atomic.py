"""Atomic writing: the old file or the new one, never half of either."""

import os
import subprocess
import sys
import tracemalloc

import pytest
from recording_os import RecordingOS
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.files.atomic import atomic_folder, atomic_write, sweep
from rwkv_dpo.files.hashed import fault_of, hash_of, hash_path, hashed_write, remove_hashed, rename_hashed


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


# A writer in a process of its own, in the middle of a file and of a folder.
WRITER = """
import sys, time
from pathlib import Path
from rwkv_dpo.files.atomic import atomic_folder, atomic_write
here = Path(sys.argv[1])
with atomic_write(here / "a[1].bin") as file, atomic_folder(here / "run") as folder:
    file.write(b"half")
    (folder / "half").write_text("half")
    file.flush()
    print("writing", flush=True)
    time.sleep(100)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    unfinished = {path.name for path in tmp_path.iterdir()}
    assert len(unfinished) == 2
    other = ".another[1].bin.0123456789abcdef.part"
    (tmp_path / other).write_text("half")

    def write():
        with atomic_write(tmp_path / "a[1].bin") as file:
            file.write(b"new")
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "new").write_text("new")

    write()
    assert set(os.listdir(tmp_path)) == {"a[1].bin", "run", other} | unfinished
    writer.kill()
    writer.wait()
    writer.stdout.close()
    write()
    assert set(os.listdir(tmp_path)) == {"a[1].bin", "run", other}
    sweep(tmp_path)
    assert set(os.listdir(tmp_path)) == {"a[1].bin", "run"}


def test_what_an_earlier_version_left_under_our_own_process_number_is_no_obstacle(tmp_path):
    """In a container every process may be number 1, the one that died before as well."""
    for end in ("part", "old"):
        (tmp_path / f".run.{os.getpid()}.{end}").mkdir()
        (tmp_path / f".run.{os.getpid()}.{end}" / "half").write_text("half")
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "new").write_text("new")
    assert os.listdir(tmp_path) == ["run"]


def test_a_folder_that_made_way_for_one_that_never_came_takes_its_name_again(tmp_path):
    former = tmp_path / ".run.0123456789abcdef.old"
    former.mkdir()
    (former / "kept").write_text("kept")
    sweep(tmp_path)
    assert (tmp_path / "run" / "kept").read_text() == "kept"
    assert os.listdir(tmp_path) == ["run"]


def test_a_link_that_lies_in_wait_is_not_written_through(tmp_path, monkeypatch):
    """Even under a name that was guessed."""
    (tmp_path / "victim").write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda n: "0123456789abcdef")
    (tmp_path / ".a.0123456789abcdef.part").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="a: cannot be written: File exists"), atomic_write(tmp_path / "a") as file:
        file.write(b"evil")
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_link_among_what_was_left_is_not_followed_and_stays(tmp_path):
    """A write leaves no links: whoever put it there is asked nothing of, and what it leads to is not opened."""
    (tmp_path / "victim").write_text("precious")
    link = tmp_path / ".a.0123456789abcdef.part"
    link.symlink_to(tmp_path / "victim")
    sweep(tmp_path)
    assert link.is_symlink()
    assert (tmp_path / "victim").read_text() == "precious"


def test_files_have_the_mode_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "a"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.fixture
def recorded(monkeypatch):
    stand_in = RecordingOS()
    for module in ("atomic", "hashed"):
        monkeypatch.setattr(f"rwkv_dpo.files.{module}.os", stand_in)
    return stand_in.record


def flushed(path):
    return ("fsync", path.stat().st_ino, path.stat().st_size)


def folder_flushed(path):
    return ("fsync", path.stat().st_ino)


def without_size_of(folder, record):
    return [entry[:2] if entry[:2] == ("fsync", folder.stat().st_ino) else entry for entry in record]


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_block_ends(tmp_path, recorded):
    with atomic_write(tmp_path / "a") as file:
        file.write(b"content")
    assert without_size_of(tmp_path, recorded) == [flushed(tmp_path / "a"), ("rename", "a"), folder_flushed(tmp_path)]


def test_a_hashed_file_is_on_the_disk_before_its_name_and_its_hash_is_before_a_new_one_and_after_another(tmp_path, recorded):
    with hashed_write(tmp_path / "a") as file:
        file.write(b"content")
    name, its_hash = [("rename", "a")], [flushed(tmp_path / "a.sha256"), ("rename", "a.sha256"), folder_flushed(tmp_path)]
    assert without_size_of(tmp_path, recorded) == [flushed(tmp_path / "a"), *its_hash, *name, folder_flushed(tmp_path)]
    recorded.clear()
    with hashed_write(tmp_path / "a") as file:
        file.write(b"content")
    its_hash[0] = flushed(tmp_path / "a.sha256")
    assert without_size_of(tmp_path, recorded) == [flushed(tmp_path / "a"), *name, *its_hash]


def test_a_folder_and_all_in_it_are_on_the_disk_before_its_name(tmp_path, recorded):
    with atomic_folder(tmp_path / "run") as folder:
        for name in "ab":
            (folder / name).write_text(name * 10)
    run = tmp_path / "run"
    got = without_size_of(run, without_size_of(tmp_path, recorded))
    assert set(got[:2]) == {flushed(run / "a"), flushed(run / "b")}
    assert got[2:] == [folder_flushed(run), ("rename", "run"), folder_flushed(tmp_path)]


def test_a_crash_between_a_file_and_its_hash_leaves_no_hash_of_another_file(tmp_path, monkeypatch):
    with hashed_write(tmp_path / "a") as file:
        file.write(b"old")

    def crash(path):
        raise ZeroDivisionError

    monkeypatch.setattr("rwkv_dpo.files.hashed.atomic_write", crash)
    with pytest.raises(ZeroDivisionError), hashed_write(tmp_path / "a") as file:
        file.write(b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert fault_of(tmp_path / "a") == "has no .sha256 beside it"


def test_a_first_checkpoint_is_whole_from_the_moment_that_it_has_its_name(tmp_path, monkeypatch):
    def crash(*_):
        raise ZeroDivisionError

    # What comes after the name.
    monkeypatch.setattr("rwkv_dpo.files.hashed.sync_folder", crash)
    with pytest.raises(ZeroDivisionError), hashed_write(tmp_path / "a") as file:
        file.write(b"new")
    assert fault_of(tmp_path / "a") == ""


def test_a_hashed_file_is_whole_as_long_as_it_has_the_bytes_that_were_written(tmp_path):
    """sha256 of "abc" as FIPS 180-2 gives it in its appendix."""
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with hashed_write(tmp_path / "a") as file:
        file.write(b"a")
        file.write(b"bc")
    assert hash_path(tmp_path / "a").read_text() == f"{sha256}  a\n"
    assert hash_of(tmp_path / "a") == sha256
    assert fault_of(tmp_path / "a") == ""
    for other in (b"ab", b"abd", b"abcd", b""):
        (tmp_path / "a").write_bytes(other)
        assert fault_of(tmp_path / "a") == "does not have the sha256 that it was written with"
    (tmp_path / "a").unlink()
    assert fault_of(tmp_path / "a") == "can't be read: No such file or directory"
    (tmp_path / "a").mkdir()
    assert fault_of(tmp_path / "a") == "can't be read: Is a directory"
    assert hash_of(tmp_path / "b") == ""


def test_a_hash_takes_the_memory_of_a_piece_of_a_file(tmp_path):
    """Of a checkpoint of many GB too; this one is a hole of 128 MB."""
    with open(tmp_path / "a", "wb") as file:
        file.truncate(1 << 27)
    hash_path(tmp_path / "a").write_text("another  a\n")
    tracemalloc.start()
    try:
        assert fault_of(tmp_path / "a") == "does not have the sha256 that it was written with"
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()


def test_a_hashed_file_is_renamed_and_removed_with_its_hash(tmp_path):
    for name, content in (("a", b"new"), ("b", b"old")):
        with hashed_write(tmp_path / name) as file:
            file.write(content)
    sha256 = hash_of(tmp_path / "a")
    rename_hashed(tmp_path / "a", tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["b", "b.sha256"]
    assert (tmp_path / "b").read_bytes() == b"new"
    assert hash_path(tmp_path / "b").read_text() == f"{sha256}  b\n"
    for _ in range(2):  # nothing is left to remove at the second
        remove_hashed(tmp_path / "b")
        assert not os.listdir(tmp_path)


def test_a_writer_that_turns_a_full_disk_into_a_fault_of_its_own_is_seen_through(tmp_path, mount_disk):
    """As torch.save does, of whose fault nobody learns that the disk is full."""
    folder = mount_disk(64)

    def write():
        with hashed_write(folder / "a") as file:
            try:
                file.write(bytes(1 << 17))  # more than the file collects before it writes
            except OSError as error:
                raise RuntimeError("unexpected pos 64 vs 0") from error

    with pytest.raises(InputError, match=r"a: cannot be written: No space left on device$"):
        write()
    assert not os.listdir(folder)


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
    fault = r"none/run: cannot be written: No such file or directory$"
    with pytest.raises(InputError, match=fault), atomic_folder(tmp_path / "none" / "run"):
        pass
