"""Compiles the CUDA kernels for sm_80 and sm_90 and prints what each needs; exits 1 on a compile error or a register spill.

Needs nvcc and no GPU; without nvcc it says so and exits 0. Run as `python tests/wkv/compile_cuda.py`.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "RWKV-v5/src/rwkv_dpo/wkv/csrc/wkv5_cuda.cu"
BASELINE = ROOT / "benchmarks/csrc/wkv5_sequential.cu"
ARCHITECTURES = ("sm_80", "sm_90")

# As torch's extension builder defines them: the conversions that the kernels may not use.
DEFINES = tuple(
    f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")
)

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


def compile_for(source: Path, architecture: str) -> str:
    """ptxas's report; CalledProcessError with the compiler's words when the source is at fault."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", *DEFINES, f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run([*command, "-o", f"{folder}/out.cubin", str(source)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def usages(report: str) -> Iterator[Usage]:
    """One per kernel of a ptxas report."""
    for match in KERNEL_REPORT.finditer(report):
        yield Usage(_readable(match["name"]), int(match["registers"]), int(match["shared"] or 0), int(match["spilled"]))


def _readable(mangled: str) -> str:
    """segment_outputs bf16 64, from a C++ symbol."""
    name = re.search(r"(segment_[a-z]+|scan_segments|sequential_[a-z_]+?)(?=I|E)", mangled)
    types = {"I6__half": "fp16", "I13__nv_bfloat16": "bf16", "IfLi": "fp32"}
    dtype = next((words for mark, words in types.items() if mark in mangled), "")
    size = re.search(r"Li(\d+)E", mangled)
    return " ".join(filter(None, (name[1] if name else mangled, dtype, size[1] if size else "")))


def main() -> int:
    if shutil.which("nvcc") is None:
        print("CUDA kernels not compiled: no nvcc on PATH")
        return 0
    spills = 0
    for architecture in ARCHITECTURES:
        for source in (KERNELS, BASELINE):
            try:
                report = compile_for(source, architecture)
            except subprocess.CalledProcessError as error:
                print(f"{source.name} does not compile for {architecture}:\n{error.stdout}{error.stderr}")
                return 1
            found = sorted(usages(report))
            if not found:
                print(f"{source.name}: no kernel in the compiler's report:\n{report}")
                return 1
            for usage in found:
                print(f"{architecture} {usage.kernel:40} {usage.registers:4} registers {usage.shared_bytes:6} bytes shared", end="")
                print(f"   SPILLS {usage.spilled_bytes} bytes" if usage.spilled_bytes else "")
                # The baseline is there to be beaten: its head size 128 may spill.
                spills += usage.spilled_bytes > 0 and source == KERNELS
    if spills:
        print(f"{spills} kernels spill registers")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
