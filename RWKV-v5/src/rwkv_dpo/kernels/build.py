"""Compiles a backend's C++ or CUDA source on first use, keeps the library, and loads it.

The sources hold plain `extern "C"` functions on raw pointers and include no torch header: they compile in seconds where a torch
extension takes a minute, and one build serves every torch version. Python calls them through ctypes.

Libraries are kept (cache.py) under a name that tells apart whatever decides their content: the sources' text, the compiler's command, the
machine.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_dpo.files.locks import try_lock
from rwkv_dpo.kernels.cache import ANOTHER_FOLDER, BuildError, cache_folder, is_sound, keep

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"

# What a compiler's last command writes, in the folder that it runs in.
LIBRARY = "library.so"

# The compiler's lines that name a fault, and those that only count them.
_ERROR = re.compile(r"\b(error|fatal|undefined|cannot find)\b", re.IGNORECASE)
_SUMMARY = re.compile(r"ld returned \d+ exit status|errors? (detected|generated)|compilation terminated|linker command failed")


class EntryPoint(NamedTuple):
    """The C types of an `extern "C"` function."""

    result: Any
    arguments: tuple[Any, ...]


class Recipe(NamedTuple):
    """What makes a library: commands that run one after the other in a folder which holds `source` and the headers beside it."""

    source: Path
    commands: tuple[tuple[str, ...], ...]
    # What else decides whether a build serves: readable, for its name; and the rest.
    variant: str
    machine: str
    # What a user can set when it fails.
    remedy: str


class Compiled(NamedTuple):
    """A library's bytes, and what the compiler said on the way."""

    library: bytes
    said: str


def load_library(recipe: Recipe, entry_points: Mapping[str, EntryPoint]) -> ctypes.CDLL:
    """The library of a recipe with its functions typed, compiled when no sound build of it is there.

    Safe to call from several processes at once. Raises BuildError.
    """
    path = cache_folder() / f"{recipe.source.stem}-{recipe.variant}-{_digest(recipe)}.so"
    if not is_sound(path):
        with _alone(path.with_suffix(".lock")):
            if not is_sound(path):
                log.info("compiling %s, once for this machine", recipe.source.name)
                keep(compiled(recipe, path.with_suffix(".log")).library, path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{recipe.source.name} was compiled, but the library can't be loaded: {error}") from error
    return bind(library, entry_points)


def bind(library: ctypes.CDLL, entry_points: Mapping[str, EntryPoint]) -> ctypes.CDLL:
    """Types the functions of a library; BuildError when it lacks one."""
    if missing := [name for name in entry_points if not hasattr(library, name)]:
        raise BuildError(f"{Path(library._name).name} has no function {', '.join(missing)}")
    for name, entry_point in entry_points.items():
        function = getattr(library, name)
        function.restype, function.argtypes = entry_point
    return library


def compiled(recipe: Recipe, log_path: Path) -> Compiled:
    """Runs a recipe. BuildError with the compiler's last error; all it said is in log_path then.

    The compiler sees relative names only: nvcc hands paths to a shell, and this one may hold anything.
    """
    said = ""
    try:
        with tempfile.TemporaryDirectory() as folder:
            for part in _parts(recipe.source):
                shutil.copyfile(part, Path(folder, part.name))
            for command in recipe.commands:
                done = subprocess.run(
                    command, cwd=folder, env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
                )  # fmt: skip
                said += done.stdout
                if done.returncode:
                    ending = f"was killed by signal {-done.returncode}" if done.returncode < 0 else "failed without a word"
                    reason = last_error(done.stdout) or f"{Path(command[0]).name} {ending}"
                    with contextlib.suppress(OSError):
                        log_path.write_text(f"{command}\n{done.stdout}")
                        reason += f" (all of it in {log_path})"
                    raise BuildError(f"{recipe.source.name} did not compile: {reason}; {recipe.remedy}")
            return Compiled(Path(folder, LIBRARY).read_bytes(), said)
    except OSError as error:
        raise BuildError(f"{recipe.source.name} did not compile: {error}") from error


def last_error(said: str) -> str:
    """Of what a compiler said, the last line that names an error, else the last line; "" when it said nothing."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.search(line) and not _SUMMARY.search(line)]
    return (errors or lines or [""])[-1]


def _parts(source: Path) -> list[Path]:
    return [source, *sorted([*source.parent.glob("*.h"), *source.parent.glob("*.cuh")])]


def _digest(recipe: Recipe) -> str:
    text = b"".join(part.read_bytes() for part in _parts(recipe.source))
    return hashlib.sha256(text + repr((recipe.commands, recipe.machine)).encode()).hexdigest()[:12]


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time compiles, the others wait for it. The system gives the lock back when its holder dies.

    Without a lock, as on file systems that have none, each compiles for itself: what comes out is the same.
    """
    try:
        file = open(path, "ab")  # noqa: SIM115 - closed by the next block
    except OSError as error:
        raise BuildError(f"cache folder {path.parent} can't be written: {error.strerror or error}; {ANOTHER_FOLDER}") from error
    with file:
        with contextlib.suppress(OSError):
            if not try_lock(file.fileno()):
                log.info("waiting for another process, which compiles %s", path.stem)
                while not try_lock(file.fileno()):
                    time.sleep(0.1)
        yield
