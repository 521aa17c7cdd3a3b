"""doctor.py as a user runs it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import doctor
from rwkv_dpo.kernels.wkv5 import cpu
from rwkv_dpo.machine.facts import KERNELS

SCRIPT = Path(__file__).resolve().parents[1] / "RWKV-v5" / "doctor.py"


def run(folder: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, str(SCRIPT), *flags], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_where_a_kernel_builds_and_agrees_the_status_is_0(tmp_path):
    done = run(tmp_path, "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert "kernel  wkv5 in C++: agrees with plain PyTorch to " in done.stdout
    assert done.stdout.splitlines()[-1] == "A run on the CPU works here, with every kernel."


def test_without_a_gpu_and_a_compiler_it_says_so_in_plain_lines(tmp_path):
    done = run(tmp_path, "--device", "cpu", CXX="no-such-compiler")
    assert (done.returncode, done.stderr) == (1, "")
    assert "\nC++     no compiler\n" in done.stdout
    assert "fault: wkv5 in C++: not used, plain PyTorch runs instead, and its part of a step takes several times as long: no " \
           "no-such-compiler on PATH; install a C++ compiler, or set CXX to one\n" in done.stdout  # fmt: skip
    assert done.stdout.splitlines()[-1].startswith(f"{len(KERNELS['cpu'])} faults; ")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Builds of its own, in this process."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    cpu.KERNELS.__dict__.pop("library", None)
    yield
    cpu.KERNELS.__dict__.pop("library", None)


def test_json_is_for_programs_and_a_wrong_kernel_is_a_fault(fresh, tmp_path, monkeypatch, capsys):
    if cpu.unusable_because(torch.device("cpu")):
        pytest.skip("no kernel here")
    monkeypatch.setattr("rwkv_dpo.kernels.agreement.ALLOWED", {"fp32": 1e-12})
    with pytest.raises(SystemExit) as end:
        doctor.main(["--device", "cpu", "--json"])
    assert end.value.code == 1
    read = json.loads(capsys.readouterr().out)
    assert "where rounding explains 1e-12" in read["kernels"][0]["fault"]
    assert [finding["is_fault"] for finding in read["findings"]].count(True) == len(KERNELS["cpu"])


def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(InputError, match="'tpu'"):
        doctor.main(["--device", "tpu"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda: no usable NVIDIA GPU here; --device cpu or auto runs on the CPU"):
            doctor.main(["--device", "cuda"])
