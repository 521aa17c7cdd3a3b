"""Compiles and links the CUDA kernels for sm_75 to sm_120, looks up what Python calls, and prints what each kernel needs; exits 1 on a
compile error, a function that the library lacks, or a register spill.

Needs nvcc and no GPU; without nvcc it says so and exits 0. Run as `python tests/kernels/compile_cuda.py`.
"""

import ctypes
import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "RWKV-v5/src"))

from rwkv_dpo.kernels.build import BuildError, EntryPoint, bind, compiled  # noqa: E402 (as above)
from rwkv_dpo.kernels.compilers import cuda_recipe, find_nvcc  # noqa: E402 (as above)
from rwkv_dpo.kernels.fused import cuda as fused  # noqa: E402 (as above)
from rwkv_dpo.kernels.wkv5 import cuda as cuda_5  # noqa: E402 (the path above makes the package importable without installing it)
from rwkv_dpo.kernels.wkv6 import cuda as cuda_6  # noqa: E402 (as above)
from rwkv_dpo.kernels.wkv7 import cuda as cuda_7  # noqa: E402 (as above)

RECURRENCES = {kernels.source: kernels.entry_points for kernels in (cuda_5.KERNELS, cuda_6.KERNELS, cuda_7.KERNELS)}
FUSED = fused.SOURCE
BASELINE = ROOT / "benchmarks/csrc/wkv5_sequential.cu"

# From the oldest that nvcc 13 knows to the newest. The benchmark's kernel needs one.
ALL = ((7, 5), (8, 0), (9, 0), (12, 0))
CAPABILITIES = {**dict.fromkeys(RECURRENCES, ALL), FUSED: ALL, BASELINE: ((9, 0),)}


def baseline() -> ModuleType:
    """benchmarks/wkv5_sequential.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("wkv5_sequential", BASELINE.parents[1] / "wkv5_sequential.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

KERNEL_REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers"
    r"(?:[^\n]*?, (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


class Usage(NamedTuple):
    kernel: str
    registers: int
    shared_bytes: int
    spilled_bytes: int


def compile_for(source: Path, capability: tuple[int, int], entry_points: Mapping[str, EntryPoint]) -> str:
    """ptxas's report on a library that has every entry point; BuildError with the compiler's words, or the function that is missing."""
    with tempfile.TemporaryDirectory() as folder:
        done = compiled(cuda_recipe(source, [capability], ("-Xptxas", "-v")), Path(folder, "log"))
        library = Path(folder, f"{source.stem}.so")
        library.write_bytes(done.library)
        bind(ctypes.CDLL(str(library)), entry_points)
    return done.said


def usages(report: str) -> Iterator[Usage]:
    """One per kernel of a ptxas report."""
    for match in KERNEL_REPORT.finditer(report):
        yield Usage(_readable(match["name"]), int(match["registers"]), int(match["shared"] or 0), int(match["spilled"]))


def _readable(mangled: str) -> str:
    """segment_outputs bf16 64, from a C++ symbol."""
    known = r"segment_[a-z]+|scan_segments|walk_tokens|sequential_[a-z_]+?|(?:mixes|gated_norm|relu_squared|sigmoid_gate)_[a-z]+|add_up"
    name = re.search(rf"({known})(?=I|E)", mangled)
    types = {"6__half": "fp16", "13__nv_bfloat16": "bf16", "fLi": "fp32"}
    dtype = next((words for mark, words in types.items() if re.search(f"[IE]{mark}", mangled)), "")
    backwards = "backwards" if re.search(r"walk_tokensILb\dELb1E", mangled) else ""
    size = re.search(r"Li(\d+)E", mangled)
    return " ".join(filter(None, (name[1] if name else mangled, backwards, dtype, size[1] if size else "")))


def main() -> int:
    nvcc = find_nvcc()
    if nvcc is None:
        print("CUDA kernels not compiled: no nvcc")
        return 0
    entry_points = {**RECURRENCES, FUSED: fused.CUDA_ENTRY_POINTS, BASELINE: baseline().ENTRY_POINTS}
    jobs = [(source, capability, entry_points[source]) for source in CAPABILITIES for capability in CAPABILITIES[source]]
    spills = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = [pool.submit(compile_for, *job) for job in jobs]
    for (source, (major, minor), _), report in zip(jobs, reports, strict=True):
        try:
            found = sorted(usages(report.result()))
        except BuildError as error:
            print(f"sm_{major}{minor} {error}")
            return 1
        if not found:
            print(f"{source.name}: no kernel in the compiler's report:\n{report.result()}")
            return 1
        for usage in found:
            print(f"sm_{major}{minor} {usage.kernel:40} {usage.registers:4} registers {usage.shared_bytes:6} bytes shared", end="")
            print(f"   SPILLS {usage.spilled_bytes} bytes" if usage.spilled_bytes else "")
            # The baseline is there to be beaten: its head size 128 may spill.
            spills += usage.spilled_bytes > 0 and source != BASELINE
    if spills:
        print(f"{spills} kernels spill registers")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
