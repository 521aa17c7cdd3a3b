"""Device choice, and CPU settings that must not change results."""

import pytest
import torch
from rwkv_dpo.device import pick_device, tune_cpu
from rwkv_dpo.errors import InputError


def test_fp32_products_stay_exact_after_tuning():
    try:
        tune_cpu(keep_memory=False)
        torch.manual_seed(0)
        a, b = torch.randn(300, 500), torch.randn(500, 200)
        exact = a.double() @ b.double()
        # fp32 sums of 500 terms; a product rounded to bf16 would be off by 2e-3.
        assert ((a @ b).double() - exact).norm() / exact.norm() < 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_refused_by_the_flags_name_and_auto_falls_back():
    assert pick_device("cpu", "--device").type == "cpu"
    assert pick_device("auto", "--device").type == "cpu"
    with pytest.raises(InputError, match="--device cuda: no usable NVIDIA GPU"):
        pick_device("cuda", "--device")
