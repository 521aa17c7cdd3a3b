"""Runs on a GPU that is not there: torch's CUDA build, Lightning and DeepSpeed for real, over a stand-in for the CUDA runtime whose kernels
do nothing. Crashes, types and devices show; values don't. NCCL is a group of one there, so that runs on several devices can't be had."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rwkv_dpo.wkv.compilers import find_nvcc

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = ROOT.parent / "shared" / "fake_gpu" / "run.sh"
KEPT = Path(os.environ.get("FAKE_GPU_HOME") or Path.home() / ".cache" / "fake_gpu")
# The stand-in would fetch it: 4.5 GB, which no test should.
CUDA_TORCH = KEPT / f"torch-{version('torch').split('+')[0]}"


def unusable_because() -> str:
    if not STAND_IN.exists():
        return f"no stand-in for a GPU: {STAND_IN} is not there"
    if not CUDA_TORCH.exists():
        return f"no CUDA build of torch for it: {CUDA_TORCH} is not there (`{STAND_IN} true` fetches 4.5 GB)"
    return "" if find_nvcc() else "no nvcc"


@pytest.mark.slow
@pytest.mark.skipif(unusable_because() != "", reason=unusable_because())
def test_every_pair_of_flag_values_takes_a_step(tmp_path):
    environment = {
        **os.environ, "FAKE_GPU_HOME": str(KEPT), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = [STAND_IN, sys.executable, ROOT / "tests" / "fake_gpu_runs.py", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    failures = [line for line in done.stdout.splitlines(keepends=True) if ": well, " not in line]
    assert done.returncode == 0, "".join(failures) + done.stderr[-3000:]
    assert done.stdout.count(": well, ") > 30
