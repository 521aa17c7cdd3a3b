"""What GPUs that are not here can compute, by their compute capability."""

import logging

import pytest
import torch
from runs import flags
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.devices.device import set_up
from rwkv_dpo.devices.gpu import slow_precision, without_kernels
from rwkv_dpo.devices.processes import take_gpu
from rwkv_dpo.devices.ranks import Ranks
from rwkv_dpo.devices.settings import DeviceSettings

# Of torch 2.13 for CUDA 13.0 and of torch 2.6 for CUDA 12.4, and of ROCm's.
CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CUDA_12 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CUDA = torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch report a GPU."""
    def appear(name: str, capability: tuple[int, int], archs: tuple[str, ...] = CUDA_13) -> None:
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
        monkeypatch.setattr("torch.cuda.get_arch_list", lambda: list(archs))

    return appear


@pytest.mark.parametrize(("capability", "archs", "runs"), [
    ((7, 0), CUDA_13, False), ((7, 0), CUDA_12, True), ((7, 5), CUDA_13, True), ((8, 9), CUDA_13, True), ((12, 0), CUDA_12, False),
    ((10, 3), CUDA_13, True), ((13, 0), CUDA_13, True), ((13, 0), CUDA_12, False), ((9, 0), ("sm_90a",), True),
    ((9, 4), ("gfx90a", "gfx942"), True), ((8, 0), (), True),
])  # fmt: skip
def test_whether_torch_has_kernels_for_a_gpu(capability, archs, runs):
    assert (without_kernels("A GPU", capability, archs) == "") is runs


def test_a_gpu_without_kernels_is_refused_before_anything_runs_there(gpu):
    gpu("Tesla V100", (7, 0))
    with pytest.raises(InputError, match=r"Tesla V100 \(compute capability 7.0\): torch .* has no kernels for it, only for sm_75, .*; "
                                         r"install a torch that has sm_70; --accelerator cpu"):  # fmt: skip
        set_up(CUDA, "fp32")


@pytest.mark.parametrize(("precision", "capability", "words"), [
    ("bf16", (7, 5), "--precision bf16: Tesla T4 (compute capability 7.5) has no bf16 and emulates it"),
    ("tf32", (7, 5), "--precision tf32: Tesla T4 (compute capability 7.5) has no TF32 and computes in fp32"),
    ("fp16", (7, 5), ""), ("fp32", (7, 5), ""), ("bf16", (8, 0), ""), ("tf32", (9, 0), ""),
])  # fmt: skip
def test_arithmetic_without_hardware_is_a_warning(gpu, caplog, precision, capability, words):
    gpu("Tesla T4", capability)
    before = torch.get_float32_matmul_precision()
    with caplog.at_level(logging.WARNING):
        set_up(CUDA, precision)
    torch.set_float32_matmul_precision(before)
    assert [record.message[: len(words)] for record in caplog.records] == ([words] if words else [])
    assert slow_precision(precision, "Tesla T4", capability).startswith(words)


@pytest.mark.parametrize(("ids", "local_rank", "own"), [("", 1, 1), ("2,0", 0, 2), ("2,0", 1, 0)])
def test_each_process_takes_its_own_gpu_before_it_uses_one(monkeypatch, ids, local_rank, own):
    taken = []
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    ranks = Ranks()
    ranks.local_rank = local_rank
    take_gpu(DeviceSettings(devices=2, gpu_ids=ids), CUDA, ranks)
    take_gpu(DeviceSettings(devices=2), torch.device("cpu"), ranks)
    assert taken == [own]


def test_a_gpu_that_is_not_there_is_refused(data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for name in ("gpu", "cuda"):
        with pytest.raises(InputError, match=f"--accelerator {name}: no usable NVIDIA GPU here; --accelerator cpu or auto"):
            train.main(flags(data, tmp_path / "out", accelerator=name))
