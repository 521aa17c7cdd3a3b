"""Device choice, and CPU settings that must not change results."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.devices import device
from rwkv_dpo.devices.device import pick_device, product_error, tune_cpu

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _precision():
    yield
    torch.set_float32_matmul_precision("highest")


def test_fp32_products_stay_exact_after_tuning():
    tune_cpu(keep_memory=False)
    torch.manual_seed(0)
    a, b = torch.randn(300, 500), torch.randn(500, 200)
    exact = a.double() @ b.double()
    # fp32 sums of 500 terms; a product rounded to bf16 would be off by 2e-3.
    assert ((a @ b).double() - exact).norm() / exact.norm() < 1e-6


@needs_onednn
@pytest.mark.parametrize(("bits", "kind"), [(7, "bf16"), (10, "tf32"), (15, "two parts in bf16")])
def test_a_library_that_rounds_is_found_out(monkeypatch, caplog, bits, kind):
    """Stands in for oneDNN on a CPU with AMX, or on some ARM: inputs are rounded to so many bits where torch allows it."""
    exactly = torch.Tensor.__matmul__

    def rounded(x):
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)

    def product(a, b):
        rounds = a.dtype == torch.float32 and torch.get_float32_matmul_precision() == "medium"
        return exactly(rounded(a), rounded(b)) if rounds else exactly(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    with caplog.at_level("INFO"):
        tune_cpu(keep_memory=False)
    assert torch.get_float32_matmul_precision() == "highest"
    assert "fp32 matrix products by torch's default: oneDNN's have " in caplog.text
    assert product_error() < 1


def test_torchs_default_is_well_within_what_fp32_allows():
    assert product_error() < 0.5


@needs_onednn
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variable is for x86")
def test_onednn_is_taken_where_it_is_exact_whatever_the_cpu_could_do():
    """Without its newest instructions it is exact on every x86 CPU."""
    code = "import torch; from rwkv_dpo.devices.device import tune_cpu; tune_cpu(False); print(torch.get_float32_matmul_precision())"
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": str(Path(device.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "medium\n", done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_refused_by_the_flags_name_and_auto_falls_back():
    assert pick_device("cpu", "--device").type == "cpu"
    assert pick_device("auto", "--device").type == "cpu"
    with pytest.raises(InputError, match="--device cuda: no usable NVIDIA GPU"):
        pick_device("cuda", "--device")
