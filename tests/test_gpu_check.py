"""benchmarks/gpu_check.sh: that its commands are ones, before there is a GPU to try them on."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu_check
from rwkv_dpo.run.flags import parse_flags


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", gpu_check.RUNS)
def test_the_flags_of_its_runs_are_accepted(tmp_path, name, small):
    settings, _ = parse_flags(gpu_check.Check(small, tmp_path, 60).flags(name, **gpu_check.RUNS[name]))
    assert settings.devices.accelerator == ("cpu" if small else "gpu")
    assert settings.length.total_steps == 4


def test_a_part_that_fails_leaves_its_reason_and_the_next_one_begins(tmp_path, monkeypatch, capsys):
    def fails(check):
        raise RuntimeError("status 1: no such kernel")

    monkeypatch.setattr(gpu_check, "PARTS", {"parity": fails, "wkv": lambda check: {"ms": 1.5}})
    status = gpu_check.main(["--small", "--out", str(tmp_path / "out.json"), "--parts", "parity", "wkv"])
    read = json.loads((tmp_path / "out.json").read_text())
    assert status == 1
    assert {name: part["measured"] for name, part in read.items()} == {"parity": {"failed": "status 1: no such kernel"}, "wkv": {"ms": 1.5}}
    assert "commit" in read["wkv"]["machine"]


def test_a_command_ends_with_the_time_and_says_so(tmp_path):
    with pytest.raises(RuntimeError, match="the check's time was over"):
        gpu_check.Check(True, tmp_path, 0).call("-c", "import time; time.sleep(60)")


def test_without_a_gpu_it_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match=r"no usable NVIDIA GPU here .*--small tries the commands on the CPU"):
        gpu_check.main([])
    with pytest.raises(SystemExit, match="--small needs --out"):
        gpu_check.main(["--small"])


@pytest.mark.slow
def test_its_first_and_its_last_part_run_small(tmp_path):
    assert gpu_check.main(["--small", "--out", str(tmp_path / "out.json"), "--parts", "doctor", "resume"]) in (0, 1)
    read = {name: part["measured"] for name, part in json.loads((tmp_path / "out.json").read_text()).items()}
    assert read["doctor"]["device"] == "cpu"
    assert 3 <= read["resume"]["stopped after"] < read["resume"]["steps"]
