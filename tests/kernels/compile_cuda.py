"""Compiles and links the CUDA kernels for sm_75 to sm_120, looks up what Python calls, and prints what each kernel needs; exits 1 on a
compile error, a function that the library lacks, a register spill, or a kernel that needs more than cuda_usage.json says.

Needs nvcc and no GPU; without nvcc it says so and exits 0. Run as `python tests/kernels/compile_cuda.py`; `--record` writes cuda_usage.json
anew. Another nvcc allots registers in another way: what is recorded is compared under the recorded version only.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

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
RECORD = Path(__file__).with_name("cuda_usage.json")

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


# In PTX, what __launch_bounds__ says.
KERNEL_THREADS = re.compile(r"\.entry (?P<name>\w+)\([^)]*\)\s*\.maxntid (?P<threads>\d+)")


class Multiprocessor(NamedTuple):
    """What the blocks of one share, by NVIDIA's table of compute capabilities; 65,536 registers and 32 lanes a warp everywhere."""

    warps: int
    blocks: int
    shared_bytes: int


MULTIPROCESSORS = {
    (7, 5): Multiprocessor(32, 16, 64 * 1024),
    (8, 0): Multiprocessor(64, 32, 164 * 1024),
    (9, 0): Multiprocessor(64, 32, 228 * 1024),
    (12, 0): Multiprocessor(48, 24, 100 * 1024),
}
# Of shared memory, what the system takes for itself in each block from compute capability 8.0 on.
RESERVED_BYTES = 1024


class Usage(NamedTuple):
    kernel: str
    registers: int
    shared_bytes: int
    spilled_bytes: int
    threads: int

    def warps(self, capability: tuple[int, int]) -> int:
        """How many warps of this kernel a multiprocessor holds. A warp gets registers by the 256, and each of the four schedulers as many
        warps as the others."""
        of, warps = MULTIPROCESSORS[capability], self.threads // 32
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256) // 4 * 4 // warps
        by_shared = of.shared_bytes // max(self.shared_bytes + RESERVED_BYTES * (capability >= (8, 0)), 1)
        return min(by_registers, by_shared, of.warps // warps, of.blocks) * warps


def compile_for(source: Path, capability: tuple[int, int], entry_points: Mapping[str, EntryPoint]) -> list[Usage]:
    """What each kernel needs, of a library that has every entry point; BuildError with the compiler's words, or the function that is
    missing."""
    with tempfile.TemporaryDirectory() as folder:
        done = compiled(cuda_recipe(source, [capability], ("-Xptxas", "-v", "-keep", "-keep-dir", folder)), Path(folder, "log"))
        library = Path(folder, f"{source.stem}.so")
        library.write_bytes(done.library)
        bind(ctypes.CDLL(str(library)), entry_points)
        return sorted(usages(done.said, Path(folder, f"{source.stem}.ptx").read_text()))


def usages(report: str, ptx: str) -> Iterator[Usage]:
    """One per kernel of a ptxas report; the threads of a block are in the PTX that it read."""
    threads = {match["name"]: int(match["threads"]) for match in KERNEL_THREADS.finditer(ptx)}
    for match in KERNEL_REPORT.finditer(report):
        needs = int(match["registers"]), int(match["shared"] or 0), int(match["spilled"])
        yield Usage(_readable(match["name"]), *needs, threads[match["name"]])


def _readable(mangled: str) -> str:
    """segment_outputs bf16 64, from a C++ symbol."""
    functions = "token_mixes|mixes|gated_norm|bonus_norm|relu_squared|sigmoid_gate|delta_keys|blend|log_decay"
    known = rf"segment_[a-z]+|scan_segments|walk_tokens|sequential_[a-z_]+?|(?:{functions})_[a-z]+|add_up"
    name = re.search(rf"({known})(?=I|E)", mangled)
    types = {"6__half": "fp16", "13__nv_bfloat16": "bf16", "fLi": "fp32"}
    dtype = next((words for mark, words in types.items() if re.search(f"[IE]{mark}", mangled)), "")
    backwards = "backwards" if re.search(r"walk_tokensILb\dELb1E", mangled) else ""
    size = re.search(r"Li(\d+)E", mangled)
    return " ".join(filter(None, (name[1] if name else mangled, backwards, dtype, size[1] if size else "")))


def record(nvcc: str, found: Mapping[str, list[Usage]]) -> dict[str, Any]:
    """What cuda_usage.json holds: by architecture and kernel, registers, bytes of shared memory, and warps a multiprocessor holds."""
    kernels: dict[str, dict[str, list[int]]] = {}
    for arch, needs in found.items():
        capability = int(arch[3:-1]), int(arch[-1])
        kernels[arch] = {}
        for usage in needs:
            # Kernels that differ in what a name leaves out share one: the worst of them.
            worst = kernels[arch].get(usage.kernel, [0, 0, 64])
            now = usage.registers, usage.shared_bytes, usage.warps(capability)
            kernels[arch][usage.kernel] = [max(worst[0], now[0]), max(worst[1], now[1]), min(worst[2], now[2])]
    return {"nvcc": nvcc, "columns": ["registers", "shared bytes", "warps per multiprocessor"], "kernels": kernels}


def worse(now: Mapping[str, Any], recorded: Mapping[str, Any]) -> Iterator[str]:
    """A line for each kernel that needs more than is recorded, or isn't recorded; none where another nvcc was recorded."""
    if now["nvcc"] != recorded["nvcc"]:
        return
    for arch, kernels in now["kernels"].items():
        for kernel, (registers, shared, warps) in kernels.items():
            if (before := recorded["kernels"].get(arch, {}).get(kernel)) is None:
                yield f"{arch} {kernel} is not in {RECORD.name}"
            elif registers > before[0] or shared > before[1] or warps < before[2]:
                yield f"{arch} {kernel}: {registers} registers, {shared} bytes shared, {warps} warps; {RECORD.name} has {before}"


def compile_all() -> dict[str, list[Usage]]:
    """By architecture, what each kernel needs; BuildError as compile_for."""
    entry_points = {**RECURRENCES, FUSED: fused.CUDA_ENTRY_POINTS, BASELINE: baseline().ENTRY_POINTS}
    jobs = [(source, capability, entry_points[source]) for source in CAPABILITIES for capability in CAPABILITIES[source]]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = [pool.submit(compile_for, *job) for job in jobs]
    found: dict[str, list[Usage]] = {}
    for (source, (major, minor), _), report in zip(jobs, reports, strict=True):
        if not report.result():
            raise BuildError(f"{source.name}: no kernel in the compiler's report")
        found.setdefault(f"sm_{major}{minor}", []).extend(report.result())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    recording = parser.parse_args().record
    nvcc = find_nvcc()
    if nvcc is None:
        print("CUDA kernels not compiled: no nvcc")
        return 0
    try:
        found = compile_all()
    except BuildError as error:
        print(error)
        return 1
    now = record("{}.{}".format(*nvcc.version), found)
    for arch, kernels in now["kernels"].items():
        for kernel, (registers, shared, warps) in kernels.items():
            print(f"{arch} {kernel:40} {registers:4} registers {shared:6} bytes shared {warps:3} warps")
    if recording:
        RECORD.write_text(json.dumps(now, indent=1) + "\n")
    # The baseline is there to be beaten: its head size 128 may spill.
    spills = [f"{arch} {usage.kernel} spills {usage.spilled_bytes} bytes" for arch, needs in found.items() for usage in needs
              if usage.spilled_bytes and not usage.kernel.startswith("sequential")]  # fmt: skip
    faults = [*spills, *worse(now, json.loads(RECORD.read_text()))]
    print(*faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
