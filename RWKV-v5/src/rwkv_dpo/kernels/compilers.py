"""Which compilers this machine has, and how they make a library of a kernel's source."""

import ctypes
import functools
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rwkv_dpo.kernels.build import LIBRARY, BuildError, Recipe

# Programs that stand before a compiler in CXX.
_LAUNCHERS = {"ccache", "sccache", "distcc", "icecc"}

# An environment of conda that is not active, NVIDIA's installer and packages, Arch Linux.
_USUAL_PLACES = (sys.prefix, "/usr/local/cuda", "/opt/cuda")


class Nvcc(NamedTuple):
    """A CUDA compiler, by its path."""

    path: str
    version: tuple[int, int]


def cpp_recipe(source: Path, flags: tuple[str, ...]) -> Recipe:
    """BuildError when there is no C++ compiler.

    Compiling and linking are two commands: what -fopenmp would link besides torch's OpenMP stays away.
    """
    compiler = _cpp_words()
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"no {compiler[0]} on PATH; install a C++ compiler, or set CXX to one")
    # torch's libraries are there when this one is loaded; macOS wants to be told.
    link = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
    return Recipe(
        source, variant="cpp", machine=_cpu_model(), remedy="set CXX to a C++ compiler that works",
        commands=(
            (*compiler, "-std=c++17", "-fPIC", *flags, "-c", source.name, "-o", "kernel.o"),
            (*compiler, "-shared", *link, "kernel.o", "-o", LIBRARY),
        ),
    )  # fmt: skip


def cuda_recipe(source: Path, capabilities: Iterable[tuple[int, int]], flags: tuple[str, ...] = ()) -> Recipe:
    """For devices of these compute capabilities, as (9, 0). BuildError when there is no nvcc."""
    nvcc = find_nvcc()
    if nvcc is None:
        # torch's wheels for CUDA 13 pin the version of that package.
        raise BuildError('no nvcc: set CUDA_HOME to a CUDA toolkit, or with a torch for CUDA 13 pip install "cuda-toolkit[nvcc,cccl]"')
    names = [f"{major}{minor}" for major, minor in sorted(set(capabilities))]
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    command = (nvcc.path, "-std=c++17", "-O3", *targets, *_host_compiler(), "-Xcompiler", "-fPIC", *_runtime(nvcc), *flags)
    return Recipe(
        source, variant=f"nvcc{nvcc.version[0]}.{nvcc.version[1]}-sm_{'_'.join(names)}", machine=platform.machine(),
        remedy="set CUDA_HOME to a CUDA toolkit that knows this GPU, CXX to a C++ compiler that this toolkit takes",
        commands=((*command, "-shared", source.name, "-o", LIBRARY),),
    )  # fmt: skip


def compiler_name() -> str:
    """The C++ compiler's own first line, "" where there is none that says one."""
    try:
        done = subprocess.run([*_cpp_words(), "--version"], capture_output=True, text=True, errors="replace", check=False)
    except (OSError, BuildError):
        return ""
    return done.stdout.split("\n")[0].strip()


@functools.cache
def find_nvcc() -> Nvcc | None:
    """The first nvcc that says its version: that of CUDA_HOME or CUDA_PATH, of PATH, of the usual places, of pip's nvidia-cuda-nvcc."""
    for path in _places_of_nvcc():
        try:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", check=False)
        except OSError:
            continue
        if version := re.search(r"release (\d+)\.(\d+)", done.stdout):
            return Nvcc(str(path), (int(version[1]), int(version[2])))
    return None


def _places_of_nvcc() -> Iterator[Path]:
    yield from (Path(home, "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name)))
    if on_path := shutil.which("nvcc"):
        yield Path(on_path)
    yield from (Path(home, "bin", "nvcc") for home in _USUAL_PLACES)
    pip = importlib.util.find_spec("nvidia")
    for folder in pip.submodule_search_locations or () if pip else ():
        yield from sorted(Path(folder).glob("*/bin/nvcc"), reverse=True)


def _runtime(nvcc: Nvcc) -> tuple[str, ...]:
    """Which CUDA runtime a library uses: torch's, which the process has, or where that doesn't know what this nvcc makes, its own.

    Neither needs libcudart.so, which pip's toolkit lacks.
    """
    present = _runtime_of_process()
    if present is not None and present[0] == nvcc.version[0] and present[1] >= nvcc.version[1]:
        return ("-cudart", "none")
    # nvcc finds it by itself, but for pip's toolkit.
    return ("-cudart", "static", f"-L{Path(nvcc.path).resolve().parents[1] / 'lib'}")


def _runtime_of_process() -> tuple[int, int] | None:
    """Its version, where torch has loaded one for all to use."""
    function = getattr(ctypes.CDLL(None), "cudaRuntimeGetVersion", None) if os.name == "posix" else None
    version = ctypes.c_int()
    if function is None or function(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _host_compiler() -> tuple[str, ...]:
    """CXX for nvcc, which takes no launcher; nvcc's own choice where CXX is not set."""
    if not os.environ.get("CXX", "").strip() or os.environ.get("NVCC_CCBIN"):
        return ()
    compiler, *options = [word for word in _cpp_words() if Path(word).name not in _LAUNCHERS] or ["c++"]
    return ("-ccbin", compiler, *(f"-Xcompiler={option}" for option in options))


def _cpp_words() -> tuple[str, ...]:
    """CXX as a shell takes it: perhaps a launcher, the compiler, options. c++ when it is unset or empty."""
    given = os.environ.get("CXX", "")
    try:
        return tuple(shlex.split(given)) or ("c++",)
    except ValueError as error:
        raise BuildError(f"CXX={given}: {error}") from error


def _cpu_model() -> str:
    """A home directory shared by unlike machines must not share builds made with -march=native."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    features = next((line for line in info.splitlines() if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {features}"
