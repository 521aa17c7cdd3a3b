"""A compiled kernel is compared with plain PyTorch before its first use, and one that computes something else is not used."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.kernels import agreement as agreements
from rwkv_dpo.kernels import parity
from rwkv_dpo.kernels.agreement import ALLOWED, compared, driver_version
from rwkv_dpo.kernels.backends import choose_backend
from rwkv_dpo.kernels.build import SOURCES
from rwkv_dpo.kernels.wkv5 import chunked, cpu, cuda, reference
from rwkv_dpo.kernels.wkv6 import chunked as chunked_6
from rwkv_dpo.kernels.wkv6 import cpu as cpu_6
from rwkv_dpo.kernels.wkv6 import cuda as cuda_6
from rwkv_dpo.kernels.wkv7 import chunked as chunked_7
from rwkv_dpo.kernels.wkv7 import cpu as cpu_7
from rwkv_dpo.kernels.wkv7 import cuda as cuda_7
from rwkv_dpo.machine.facts import KERNELS

CPU = torch.device("cpu")
# Of csrc/wkv5_cpu.cpp: a line of the forward, and one of the backward pass, with a fault in it.
FAULTS = {
    "forward": ("sum += score[b][a] * load(payload[a] + j)", "sum -= score[b][a] * load(payload[a] + j)"),
    "backward": ("d_sum += float(b) * load", "d_sum += 1.01f * float(b) * load"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder that kernels, and what is known about them, are kept in."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    cpu.KERNELS.__dict__.pop("library", None)
    yield tmp_path / "cache" / f"rwkv_dpo-{os.getuid()}"
    cpu.KERNELS.__dict__.pop("library", None)


@pytest.fixture
def comparisons(monkeypatch) -> list[object]:
    """Of kernels and plain PyTorch, as they are made."""
    made: list[object] = []
    monkeypatch.setattr(agreements, "compared", lambda compare: made.append(compare) or compared(compare))
    return made


def known(cache: Path) -> Path:
    (path,) = cache.glob("*-agrees-*.json")
    return path


def break_kernel(folder: Path, monkeypatch, fault: str) -> None:
    text, (right, wrong) = (SOURCES / "wkv5_cpu.cpp").read_text(), FAULTS[fault]
    assert right in text
    (folder / "wkv5_cpu.cpp").write_text(text.replace(right, wrong))
    for header in SOURCES.glob("*.h"):
        shutil.copy(header, folder)
    monkeypatch.setattr(cpu.KERNELS, "folder", folder)


class TestAWrongKernel:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_auto_takes_the_next_backend_and_says_how_far_off_it_was(self, tmp_path, monkeypatch, caplog, fault):
        break_kernel(tmp_path, monkeypatch, fault)
        assert choose_backend("5", "auto", CPU).name == "chunked"
        assert "WKV backend: chunked" in caplog.text
        assert "off plain PyTorch's on this device, where rounding explains 2e-05" in caplog.text

    def test_a_named_backend_is_refused_and_tried_again_next_time(self, tmp_path, monkeypatch, comparisons):
        break_kernel(tmp_path, monkeypatch, "backward")
        for _ in range(2):
            with pytest.raises(InputError, match=r"cpu can't be used on cpu: its gradient of time_decay in fp32 is \d\.\de-0[34] "):
                choose_backend("5", "cpu", CPU)
        assert len(comparisons) == 2


class TestWhatIsKnown:
    def test_a_build_is_compared_once(self, cache, comparisons):
        found = [cpu.agreement(CPU) for _ in range(3)]
        assert len(comparisons) == 1
        assert found[0] == found[1] == found[2]
        assert found[0].errors.keys() == ALLOWED.keys()
        assert all(0 < found[0].errors[dtype] <= ALLOWED[dtype] for dtype in ALLOWED)

    def test_and_again_when_asked_or_when_what_is_known_is_not_this_users_or_not_whole(self, cache, comparisons):
        cpu.agreement(CPU)
        cpu.agreement(CPU, again=True)
        known(cache).chmod(0o666)
        cpu.agreement(CPU)
        known(cache).write_text(known(cache).read_text().replace("e-", "e-1"))
        cpu.agreement(CPU)
        known(cache).unlink()
        cpu.agreement(CPU)
        assert len(comparisons) == 5

    def test_another_device_driver_or_torch_is_another_case(self, cache, monkeypatch, comparisons):
        for identity in (["cpu", "2.13"], ["cpu", "2.14"], ["H100", "sm_90", "", "580.65", "2.13"], ["H100", "sm_90", "", "590.1", "2.13"]):
            monkeypatch.setattr(agreements, "identity", lambda device, it=identity: it)
            cpu.agreement(CPU)
        assert len(comparisons) == len(list(cache.glob("*-agrees-*.json"))) == 4

    def test_a_folder_that_takes_no_more_files_only_means_another_comparison(self, monkeypatch, comparisons):
        def full(content, path):
            raise agreements.BuildError("no space left")

        monkeypatch.setattr(agreements, "keep", full)
        assert [cpu.agreement(CPU).fault for _ in range(2)] == [None, None]


class TestComparing:
    def test_chunked_agrees_and_a_twin_of_other_numbers_does_not(self):
        for version, wkv in (("5", chunked.wkv5), ("6", chunked_6.wkv6), ("7", chunked_7.wkv7)):
            assert compared(parity.comparison(version, wkv, CPU)).fault is None

        def off(r, k, v, time_decay, u, cu_seqlens, state0):
            return reference.wkv5(r, k, v, time_decay + 1e-3, u, cu_seqlens, state0)

        assert "in fp32 is" in (compared(parity.comparison("5", off, CPU)).fault or "")

    @pytest.mark.parametrize("module", [cpu, cpu_6, cpu_7])
    def test_the_kernels_of_every_version_are_held_to_it(self, monkeypatch, module):
        assert module.unusable_because(CPU) is None
        monkeypatch.setattr(agreements, "ALLOWED", {"fp32": 1e-12})
        assert "where rounding explains 1e-12" in (module.unusable_because(CPU) or "")

    @pytest.mark.parametrize(("dtype", "by"), [("fp32", 4e-5), ("bf16", 2e-2), ("fp16", 2e-3)])
    def test_each_dtype_has_its_own_bound(self, dtype, by):
        x = torch.ones(9)
        found = compared(lambda of: {"x": (x * (1 + by) if of == agreements.DTYPES[dtype] else x, x)})
        assert f"its x in {dtype} is " in (found.fault or "")

    def test_numbers_that_are_not_finite_agree_with_nothing(self):
        x = torch.ones(9)
        assert "its y in fp32 is nan" in (compared(lambda of: {"x": (x, x), "y": (x * float("nan"), x), "z": (x + 1, x)}).fault or "")

    def test_a_kernel_that_fails_to_run_is_a_line(self):
        def fails(dtype):
            raise RuntimeError("CUDA error: too many resources\nrequested for launch")

        assert compared(fails).fault == "its first use here failed, in fp32: CUDA error: too many resources requested for launch"

    def test_no_random_numbers_are_drawn_and_gradients_need_not_be_on(self):
        state = torch.get_rng_state()
        with torch.inference_mode():
            assert compared(parity.comparison("5", cpu.wkv5, CPU)).fault is None
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    @pytest.mark.parametrize("module", [cuda, cuda_6, cuda_7])
    def test_the_cuda_kernels_agree_on_this_gpu(self, module):
        found = module.agreement(torch.device("cuda"), again=True)
        assert found.fault is None
        assert found.errors.keys() == ALLOWED.keys()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs c++")
@pytest.mark.parametrize("name", KERNELS["cpu"])
def test_where_there_is_a_compiler_every_kernel_is_used(name):
    """Other tests skip what can't be used, and a kernel that computes something else can't be."""
    assert KERNELS["cpu"][name].unusable_because(CPU) is None


@pytest.mark.parametrize(("text", "version"), [
    ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\nGCC version: 13\n", "580.65.06"),
    ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.256  Thu May  2 19:13:37 UTC 2024\n", "470.256"),
])  # fmt: skip
def test_the_driver_is_read_where_linux_tells_it(tmp_path, monkeypatch, text, version):
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(agreements, "_DRIVER", tmp_path / "version")
    assert driver_version.__wrapped__() == version


@pytest.mark.parametrize(("script", "version"), [("echo 581.80", "581.80"), ("echo no devices; exit 9", ""), (None, "")])
def test_and_elsewhere_asked_of_nvidia_smi(tmp_path, monkeypatch, script, version):
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(agreements, "_DRIVER", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver_version.__wrapped__() == version
