"""Runs on a GPU that is not there (fake_gpu.py). Crashes, types and devices show; values don't. NCCL is a group of one there, so that runs
on several devices can't be had."""

from pathlib import Path

import pytest
from fake_gpu import run_on_fake_gpu, unusable_because
from rwkv_dpo.kernels.compilers import find_nvcc

CANNOT = unusable_because() or ("" if find_nvcc() else "no nvcc")


@pytest.mark.slow
@pytest.mark.skipif(CANNOT != "", reason=CANNOT)
def test_every_pair_of_flag_values_takes_a_step(tmp_path):
    done = run_on_fake_gpu(Path(__file__).with_name("fake_gpu_runs.py"), tmp_path)
    failures = [line for line in done.stdout.splitlines(keepends=True) if ": well, " not in line]
    assert done.returncode == 0, "".join(failures) + done.stderr[-3000:]
    assert done.stdout.count(": well, ") > 30
