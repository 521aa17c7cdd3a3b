"""What is said of a machine: of this one as it is, and of machines that are not here by what would be found on them."""

import json
from dataclasses import replace

import pytest
import torch
from rwkv_dpo.kernels import agreement as agreements
from rwkv_dpo.kernels.wkv5 import cpu
from rwkv_dpo.machine import facts as looking
from rwkv_dpo.machine.facts import Facts, Gpu, Kernel, gather, look_at_kernels, look_for_gpus
from rwkv_dpo.machine.findings import findings
from rwkv_dpo.machine.report import as_json_text, as_text, in_a_line

H100 = Gpu("NVIDIA H100", (9, 0), 85_000_000_000, 84_000_000_000)
T4 = Gpu("Tesla T4", (7, 5), 16_000_000_000, 15_000_000_000)
V100 = Gpu("Tesla V100", (7, 0), 16_000_000_000, 15_000_000_000)
IN_CUDA = Kernel("wkv5 in CUDA", {"fp32": 3e-7, "bf16": 2e-3, "fp16": 2e-4})
WELL = Facts(
    device="cuda", system="Linux", is_wsl=False, python="3.12.1", torch="2.13.0", torch_cuda="13.0", torch_hip="",
    torch_archs=("sm_75", "sm_80", "sm_90", "sm_120"), driver="580.65.06", gpus=(H100,), gpu_fault="", nvcc="13.0",
    nvcc_path="/usr/local/cuda/bin/nvcc", cpp="g++ 13.3.0", cpu="A CPU, 16 threads", kernels=(IN_CUDA,), cache="/home/me/.cache/rwkv_dpo-1",
    cache_free=10**12, here_free=10**12, host_free=10**11,
)  # fmt: skip
ON_CPU = replace(WELL, device="cpu", driver="", gpus=(), torch_archs=(), kernels=(Kernel("wkv5 in C++", IN_CUDA.errors),))
NO_NVCC = Kernel("wkv5 in CUDA", fault='no nvcc: set CUDA_HOME to a CUDA toolkit, or with a torch for CUDA 13 pip install "cuda-toolkit"')
WRONG = Kernel("wkv5 in CUDA", fault="its y in bf16 is 3.0e-01 (relative) off plain PyTorch's")

# By what is found: whether that is a fault, and what is said.
MACHINES = {
    "another CUDA than torch's": (replace(WELL, nvcc="12.4"), False, "nvcc is of CUDA 12.4, torch of 13.0: the kernels take their own"),
    "no nvcc": (replace(WELL, nvcc="", kernels=(NO_NVCC,)), True, "plain PyTorch runs instead, and a run will be several times slower: no"),
    "a wrong kernel": (replace(WELL, kernels=(WRONG,)), True, "its y in bf16 is 3.0e-01 (relative) off plain PyTorch's"),
    "Turing": (replace(WELL, gpus=(T4,)), False, "Tesla T4 (compute capability 7.5) has no bf16 and emulates it"),
    "Volta": (replace(WELL, gpus=(V100,)), True, "Tesla V100 (compute capability 7.0): torch 2.13"),
    "Volta, an older torch": (replace(WELL, gpus=(V100,), torch_archs=("sm_70",)), False, "Tesla V100 (compute capability 7.0) has no"),
    "ROCm": (replace(WELL, torch_cuda="", torch_hip="6.4", driver="", nvcc="", torch_archs=("gfx942",), kernels=(
        replace(NO_NVCC, fault="this torch is built for AMD's GPUs (ROCm), and the kernels are CUDA"),)),
        True, "AMD's GPUs (ROCm 6.4): the CUDA kernels can't run, the plain PyTorch backend `chunked` does, and a run will be several"),
    "Windows": (replace(WELL, system="Windows", kernels=(NO_NVCC,)), True, "Windows: kernels are built on Linux alone, the plain PyTorch"),
    "WSL": (replace(WELL, is_wsl=True), False, "WSL: all runs as on Linux, but files under /mnt"),
    "a torch for CPUs": (replace(ON_CPU, driver="580.65", torch="2.13.0+cpu", torch_cuda=""), True, "torch 2.13.0+cpu is built for CPUs"),
    "an old driver": (replace(ON_CPU, driver="450.1", gpu_fault="The NVIDIA driver on your system is too old (found version 11000)."),
                      True, "can't use the GPU: The NVIDIA driver on your system is too old"),
    "a hidden GPU": (replace(ON_CPU, driver="580.65"), True, "CUDA_VISIBLE_DEVICES or a container hides it"),
    "no GPU": (ON_CPU, False, "no GPU here: train.py needs --accelerator cpu or auto"),
    "no compiler": (replace(ON_CPU, cpp="", kernels=(Kernel("wkv5 in C++", fault="no c++ on PATH; install one"),)), True,
                    "plain PyTorch runs instead, and its part of a step takes several times as long: no c++ on PATH"),
    "no cache": (replace(WELL, cache="", cache_free=None), True, "no folder to keep compiled kernels in; TORCH_EXTENSIONS_DIR names one"),
    "a full cache": (replace(WELL, cache_free=10**6), True, "/home/me/.cache/rwkv_dpo-1: 1 MB free, too little"),
    "a full disk": (replace(WELL, here_free=10**9), False, "1.0 GB of disk free here"),
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_one_line_says_what_runs_instead_and_what_it_costs(name):
    facts, is_fault, words = MACHINES[name]
    [found] = [line for line in as_text(facts).splitlines() if words in line]
    assert found.startswith("fault: " if is_fault else "note: ")
    assert len([finding for finding in findings(facts) if finding.is_fault]) == is_fault
    assert as_text(facts).splitlines()[-1].startswith("1 fault; " if is_fault else "A run on the ")


def test_of_a_machine_that_has_all_there_is_nothing_to_say():
    assert findings(WELL) == []
    assert as_text(WELL).splitlines()[-1] == "A run on the GPU works here, with every kernel."


def test_two_gpus_of_a_kind_are_told_once():
    facts = replace(WELL, gpus=(T4, replace(T4, free=1), H100))
    assert len(findings(facts)) == 1
    assert [line.split()[1:3] for line in as_text(facts).splitlines() if line.startswith("GPU ")] == [["Tesla", "T4,"]] * 2 + [
        ["NVIDIA", "H100,"]
    ]


def test_a_run_on_a_gpu_begins_with_one_line():
    assert in_a_line(WELL) == (
        "GPU: NVIDIA H100, sm_90, 84.0 GB of 85.0 GB free; driver 580.65.06, torch for CUDA 13.0, nvcc 13.0; wkv5 in CUDA agrees with "
        "plain PyTorch to 3e-07 in fp32, 2e-03 in bf16, 2e-04 in fp16; 1000.0 GB of disk free"
    )
    assert "wkv5 in CUDA can't be used here" in in_a_line(replace(WELL, kernels=(NO_NVCC,)))


def test_as_json_it_has_the_facts_and_the_findings():
    read = json.loads(as_json_text(MACHINES["no nvcc"][0]))
    assert read["gpus"] == [{"name": "NVIDIA H100", "capability": [9, 0], "total": 85_000_000_000, "free": 84_000_000_000}]
    assert read["kernels"][0]["fault"].startswith("no nvcc")
    assert [finding["is_fault"] for finding in read["findings"]] == [True]


class TestThisMachine:
    def test_what_is_found_is_what_the_system_says(self):
        facts = gather(torch.device("cpu"), thorough=False)
        assert (facts.device, facts.torch, len(facts.kernels)) == ("cpu", torch.__version__, len(looking.KERNELS["cpu"]))
        assert facts.here_free > 0
        assert facts.host_free is None or 0 < facts.host_free < 1 << 50

    def test_kernels_are_compared_again_by_the_doctor_and_not_by_a_run(self, monkeypatch):
        if cpu.unusable_because(torch.device("cpu")):
            pytest.skip("no kernel here")
        made = []
        compared = agreements.compared
        monkeypatch.setattr(agreements, "compared", lambda compare: made.append(1) or compared(compare))
        assert look_at_kernels(torch.device("cpu"), again=False)[0].errors
        assert not made
        assert look_at_kernels(torch.device("cpu"), again=True)[0].errors
        assert made

    def test_a_run_looks_at_its_own_gpu_alone(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 2)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda i: (i, 10))
        monkeypatch.setattr("torch.cuda.get_device_name", lambda i: f"GPU {i}")
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda i: (9, i))
        assert [gpu.name for gpu in look_for_gpus(every=False)[0]] == ["GPU 2"]
        assert [(gpu.name, gpu.arch, gpu.free) for gpu in look_for_gpus(every=True)[0]] == [(f"GPU {i}", f"sm_9{i}", i) for i in range(4)]

    def test_why_torch_cannot_use_a_gpu_is_torchs_own_line(self, monkeypatch):
        def init():
            raise RuntimeError("The NVIDIA driver on your system is too old.\nPlease update")

        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("torch.version.cuda", "13.0")
        monkeypatch.setattr(looking, "driver_version", lambda: "450.1")
        monkeypatch.setattr("torch.cuda.init", init)
        assert look_for_gpus(every=True) == ((), "The NVIDIA driver on your system is too old.")
