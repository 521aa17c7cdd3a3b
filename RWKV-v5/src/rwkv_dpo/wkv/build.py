"""Compiles a backend's C++ or CUDA source on first use, with ninja, into torch's extension cache.

The sources hold plain `extern "C"` functions on raw pointers and include no torch header: they compile in seconds where a
torch extension takes a minute, and one build serves every torch version. Python calls them through ctypes.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"


class BuildError(RuntimeError):
    """A kernel that did not compile; the message ends with the compiler's log."""


def load_library(source: str, cflags: tuple[str, ...] = (), cuda_cflags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compile csrc/`source` (once per source text, flags and machine) and load it.

    Safe to call from several processes at once. Raises BuildError with the log.
    """
    library = _attempt(source, cflags, cuda_cflags)
    if isinstance(library, BuildError):
        raise library
    return library


@cache
def _attempt(source: str, cflags: tuple[str, ...], cuda_cflags: tuple[str, ...]) -> ctypes.CDLL | BuildError:
    """A failure is remembered like a success: torch's builder does not compile the same text twice in a process, so a second
    attempt would report a missing file in place of the compiler's log."""
    from torch.utils import cpp_extension  # imports setuptools: a second that a run with another backend need not spend

    os.environ["PATH"] = _search_path()
    path = SOURCES / source
    # The sources' text and the flags name the build, so that an edited kernel or another checkout never meets a stale one.
    text = b"".join(part.read_bytes() for part in (path, *sorted(SOURCES.glob("*.cuh"))))
    digest = hashlib.sha256(text + repr((cflags, cuda_cflags, _cpu_model())).encode()).hexdigest()[:12]
    name = f"rwkv_dpo_{path.stem}_{digest}"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / name
    printed = io.StringIO()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), redirect_stdout(printed), redirect_stderr(printed):
            cpp_extension.load(
                name, [str(path)], extra_cflags=list(cflags), extra_cuda_cflags=list(cuda_cflags),
                build_directory=str(folder), is_python_module=False,
            )
    except (RuntimeError, OSError, ImportError, subprocess.CalledProcessError) as error:
        return BuildError(f"{source} did not compile; the log:\n{printed.getvalue()}{error}")
    return ctypes.CDLL(str(folder / f"{name}.so"))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time. The system gives the lock back when its holder dies; torch's own is a file, and a build that was killed
    leaves it there for every later run to wait on for ever."""
    with open(folder / "owner", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def missing_tool(*tools: str) -> str | None:
    """The first of `tools` that is not on PATH, as a reason in words, or None."""
    for tool in tools:
        if shutil.which(tool, path=_search_path()) is None:
            return f"no {tool} on PATH"
    return None


def _search_path() -> str:
    """PATH, and the environment's bin where pip puts ninja: it is on PATH only when the environment is activated."""
    own_bin, path = str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)
    return path if own_bin in path.split(os.pathsep) else f"{own_bin}{os.pathsep}{path}"


def _cpu_model() -> str:
    """A home directory shared by unlike machines must not share builds made with -march=native."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    return next((line for line in info.splitlines() if line.startswith(("flags", "Features"))), "")
