"""Building a kernel on first use, keeping it, and what may be loaded of what was kept."""

import ctypes
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from rwkv_dpo.files.locks import try_lock
from rwkv_dpo.kernels.build import BuildError, EntryPoint, Recipe, last_error, load_library
from rwkv_dpo.kernels.compilers import cpp_recipe, cuda_recipe, find_nvcc

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

FORK = multiprocessing.get_context("fork")
SEVEN = {"seven": EntryPoint(ctypes.c_int, ())}
@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder that kernels are kept in."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / f"rwkv_dpo-{os.getuid()}"


@pytest.fixture
def source(tmp_path) -> Path:
    return write_source(tmp_path)


def write_source(folder: Path, number: int = 7) -> Path:
    source = folder / "seven.cpp"
    source.write_text(f'extern "C" int seven() {{ return {number}; }}\n')
    return source


def load(source: Path) -> ctypes.CDLL:
    return load_library(cpp_recipe(source, ("-O1",)), SEVEN)


def load_elsewhere(source: Path) -> BaseProcess:
    """In a process of its own, whose status is seven's number: one that dies of what it loads takes nobody along."""
    process = FORK.Process(target=lambda: os._exit(load(source).seven()))
    process.start()
    return process


def status(process: BaseProcess) -> int | None:
    process.join(100)
    return process.exitcode


def kept(cache: Path) -> Path:
    (library,) = cache.glob("*.so")
    return library


def replace(library: Path, content: bytes) -> None:
    """By a new file: this process has the old one in its memory."""
    library.unlink()
    library.write_bytes(content)
    library.chmod(0o600)


def compiler(folder: Path, script: str) -> str:
    """A program that stands for the C++ compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


class TestWhatIsKept:
    def test_a_kernel_is_compiled_once_and_again_when_its_text_changes(self, source, cache, tmp_path, monkeypatch):
        log = tmp_path / "calls"
        monkeypatch.setenv("CXX", compiler(tmp_path, f'echo call >> "{log}"; exec c++ "$@"'))
        assert [load(source).seven(), load(source).seven()] == [7, 7]
        # Compiled and linked.
        assert log.read_text().count("call") == 2
        write_source(tmp_path, number=8)
        assert load(source).seven() == 8
        assert log.read_text().count("call") == 4

    def test_other_flags_and_another_machine_have_builds_of_their_own(self, source, cache):
        source.write_text('extern "C" int seven() { return NUMBER; }\n')
        recipes = [cpp_recipe(source, (f"-DNUMBER={n}",)) for n in (7, 8)]
        assert [load_library(recipe, SEVEN).seven() for recipe in recipes] == [7, 8]
        load_library(recipes[0]._replace(machine="another"), SEVEN)
        assert len(list(cache.glob("*.so"))) == 3

    @pytest.mark.parametrize("damage", [b"", b"\x7fELF", "half", "a byte"])
    def test_a_damaged_library_is_built_again(self, source, cache, damage):
        assert load(source).seven() == 7
        whole = kept(cache).read_bytes()
        replace(kept(cache), {"half": whole[: len(whole) // 2], "a byte": whole[:-9] + b"!" + whole[-8:]}.get(damage, damage))
        assert status(load_elsewhere(source)) == 7
        assert kept(cache).read_bytes() == whole

    def test_a_library_without_its_hash_is_built_again(self, source, cache):
        load(source)
        kept(cache).with_name(f"{kept(cache).name}.sha256").unlink()
        assert status(load_elsewhere(source)) == 7

    def test_what_another_program_put_there_by_a_link_is_not_loaded(self, source, cache, tmp_path):
        load(source)
        library = kept(cache)
        foreign = tmp_path / "foreign.so"
        library.rename(foreign)
        library.symlink_to(foreign)
        load(source)
        assert not library.is_symlink()
        assert foreign.exists()

    def test_a_library_that_others_can_write_is_built_again(self, source, cache):
        load(source)
        kept(cache).chmod(0o666)
        before = kept(cache).stat().st_ino
        load(source)
        assert kept(cache).stat().st_ino != before
        assert stat.S_IMODE(kept(cache).stat().st_mode) == 0o600

    @pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
    def test_a_library_of_another_user_is_built_again(self, source, cache):
        load(source)
        os.chown(kept(cache), 12345, -1)
        load(source)
        assert kept(cache).stat().st_uid == 0

    @pytest.mark.parametrize("umask", [0, 0o022])
    def test_nobody_else_can_write_the_folder_whatever_the_umask(self, source, cache, umask):
        before = os.umask(umask)
        try:
            load(source)
            assert stat.S_IMODE(cache.stat().st_mode) == 0o700
            cache.chmod(0o777)
            load(source)
            assert stat.S_IMODE(cache.stat().st_mode) == 0o700
            assert not kept(cache).stat().st_mode & 0o077
        finally:
            os.umask(before)

    @pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away")
    def test_a_folder_of_another_user_is_refused_in_words(self, source, cache):
        cache.mkdir(parents=True)
        os.chown(cache, 12345, -1)
        with pytest.raises(BuildError, match=r"cache folder .* is not this user's own.*; TORCH_EXTENSIONS_DIR names another"):
            load(source)

    def test_without_the_variable_it_is_the_users_cache_folder(self, source, tmp_path, monkeypatch):
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        load(source)
        assert kept(tmp_path / "home/.cache" / f"rwkv_dpo-{os.getuid()}").exists()


class TestManyProcesses:
    def test_processes_that_start_together_compile_once(self, source, tmp_path, monkeypatch):
        log = tmp_path / "calls"
        monkeypatch.setenv("CXX", compiler(tmp_path, f'echo call >> "{log}"; sleep 1; exec c++ "$@"'))
        processes = [load_elsewhere(source) for _ in range(3)]
        assert [status(process) for process in processes] == [7, 7, 7]
        assert log.read_text().count("call") == 2

    def test_a_lock_that_another_holds_is_waited_for_and_never_deleted(self, source, cache):
        load(source)
        kept(cache).unlink()
        (lock,) = cache.glob("*.lock")
        number = lock.stat().st_ino
        is_held, reader = FORK.Event(), FORK.Event()

        def hold() -> None:
            with open(lock, "ab") as file:
                assert try_lock(file.fileno())
                is_held.set()
                time.sleep(1)
                # The other waits: had it finished, or deleted the lock to make its own, this would be seen.
                os._exit(int(reader.is_set() or lock.stat().st_ino != number))

        holder = FORK.Process(target=hold)
        holder.start()
        assert is_held.wait(60)
        load(source)
        reader.set()
        assert status(holder) == 0
        assert lock.stat().st_ino == number

    def test_a_build_that_was_killed_holds_up_no_later_run(self, source, tmp_path, monkeypatch):
        monkeypatch.setenv("CXX", compiler(tmp_path, "kill -KILL $PPID"))
        killed = load_elsewhere(source)
        assert status(killed) == -signal.SIGKILL
        compiler(tmp_path, 'exec c++ "$@"')
        assert status(load_elsewhere(source)) == 7


class TestCompilers:
    @pytest.mark.parametrize("name", ["check$out", "with space", "quo'te"])
    def test_a_path_may_hold_anything(self, tmp_path, monkeypatch, name):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "cache"))
        assert load(write_source(folder)).seven() == 7

    @pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
    def test_a_path_may_hold_anything_for_nvcc_too(self, tmp_path, monkeypatch):
        """It hands what it is given to a shell. What it links has a CUDA runtime of its own, and loads without a GPU."""
        folder = tmp_path / "check$out 'with' space"
        folder.mkdir()
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "cache"))
        source = folder / "seven.cu"
        source.write_text('__global__ void kernel() {}\nextern "C" int seven() { kernel<<<1, 1>>>(); return 7; }\n')
        assert load_library(cuda_recipe(source, [(9, 0)]), SEVEN).seven() == 7

    @pytest.mark.parametrize("value", ["", "  ", "env c++", "c++ -DNDEBUG"])
    def test_cxx_may_be_empty_or_several_words(self, source, monkeypatch, value):
        monkeypatch.setenv("CXX", value)
        assert load(source).seven() == 7


class TestReasons:
    def test_the_compilers_error_and_where_the_rest_is(self, tmp_path, cache):
        source = tmp_path / "seven.cpp"
        source.write_text('extern "C" int seven() { return undeclared_name; }\n')
        with pytest.raises(BuildError, match=r"seven.cpp did not compile: .*'undeclared_name' was not declared.*; set CXX to") as caught:
            load(source)
        (log,) = cache.glob("*.log")
        assert f"(all of it in {log})" in str(caught.value)
        assert "undeclared_name" in log.read_text()
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("script", "reason"),
        [("echo no licence; exit 1", "no licence"), ("exit 3", "compiler failed without a word"), ("kill -9 $$", "was killed by signal 9")],
    )
    def test_a_compiler_that_fails_in_its_own_way(self, source, tmp_path, monkeypatch, script, reason):
        monkeypatch.setenv("CXX", compiler(tmp_path, script))
        with pytest.raises(BuildError, match=reason):
            load(source)

    @pytest.mark.parametrize(
        ("value", "reason"), [("no-such-compiler", "no no-such-compiler on PATH"), ('"open', 'CXX="open: No closing quotation')]
    )
    def test_a_compiler_that_is_not_there(self, source, monkeypatch, value, reason):
        monkeypatch.setenv("CXX", value)
        with pytest.raises(BuildError, match=reason):
            load(source)

    def test_a_folder_that_cannot_be_written(self, source, tmp_path, monkeypatch):
        (tmp_path / "a file").touch()
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "a file"))
        with pytest.raises(BuildError, match=r"cache folder .*a file/rwkv_dpo-\d+ can't be written: .*; TORCH_EXTENSIONS_DIR names"):
            load(source)

    def test_a_read_only_cache(self, source, cache, mount_disk, monkeypatch):
        folder = mount_disk(1000)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        with pytest.raises(BuildError, match=r"cache folder .* can't be written: Read-only file system"):
            load(source)

    def test_a_full_disk(self, source, mount_disk, monkeypatch):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(mount_disk(8)))
        with pytest.raises(BuildError, match=r"the compiled kernel can't be kept: .*No space left.*; TORCH_EXTENSIONS_DIR names another"):
            load(source)

    def test_a_missing_function_is_named(self, source):
        wanted = {**SEVEN, "eight": EntryPoint(ctypes.c_int, ()), "nine": EntryPoint(ctypes.c_int, ())}
        with pytest.raises(BuildError, match=r"seven-cpp-\w+.so has no function eight, nine"):
            load_library(cpp_recipe(source, ("-O1",)), wanted)

    def test_a_library_that_does_not_load(self, source):
        recipe = Recipe(source, (("sh", "-c", "echo nonsense > library.so"),), variant="odd", machine="", remedy="")
        with pytest.raises(BuildError, match=r"seven.cpp was compiled, but the library can't be loaded: .*seven-odd"):
            load_library(recipe, SEVEN)

    @pytest.mark.parametrize(
        ("said", "line"),
        [
            ("ld: cannot find -lcudart\ncollect2: error: ld returned 1 exit status\n", "ld: cannot find -lcudart"),
            ("a.cu(3): error: no x\n\n1 error detected in the compilation of \"a.cu\".\n", "a.cu(3): error: no x"),
            ("nvcc fatal   : Unsupported gpu architecture 'compute_120'\n", "nvcc fatal   : Unsupported gpu architecture 'compute_120'"),
            ("first\nlast\n\n", "last"),
            ("", ""),
        ],
    )  # fmt: skip
    def test_the_last_line_that_names_an_error_is_the_reason(self, said, line):
        assert last_error(said) == line
