"""Where a program runs and in which arithmetic; and CPU settings that make it faster and change no result."""

import ctypes
import logging
import os

import torch

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.devices.gpu import check_gpu

log = logging.getLogger(__name__)

# glibc's mallopt: parameter numbers from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

COMPUTE_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name: str, flag: str) -> torch.device:
    """cpu, cuda (or gpu), or auto: a GPU when there is one. A GPU that `flag` names and that isn't there is refused."""
    if name == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available() and torch.cuda.device_count():
        return torch.device("cuda")
    if name == "auto":
        log.info("device: cpu (no usable GPU)")
        return torch.device("cpu")
    refuse(f"{flag} {name}: no usable NVIDIA GPU here; {flag} cpu or auto runs on the CPU")


def set_up(device: torch.device, precision: str, keep_memory: bool = True) -> None:
    """How fp32 matrix products are computed (exactly for fp32, in TF32 otherwise on a GPU), and memory handling on a CPU. Refuses a GPU
    that this torch can't use."""
    if device.type == "cpu":
        tune_cpu(keep_memory)
    else:
        check_gpu(device, precision)
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")


def tune_cpu(keep_memory: bool) -> None:
    """Sets how freed memory is handled, and sends fp32 matrix products to the faster library; says what it did."""
    done = []
    # By default glibc does a bit of both: it hands large blocks back and faults them in again every step, and keeps blocks
    # below 32 MB in a heap that fragments, half as much again on top of the tensors.
    keep = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20}
    if _set_malloc(keep if keep_memory else {_M_MMAP_THRESHOLD: 1 << 20}):
        done.append(f"freed memory is {'kept for the next step' if keep_memory else 'given back at once'}")
    if torch.backends.mkldnn.is_available():
        # "medium" lets torch use oneDNN, which is twice as fast as the default, and lets oneDNN round to bf16, which it does on some CPUs.
        torch.set_float32_matmul_precision("medium")
        error = product_error()
        if error < 1:
            done.append("fp32 matrix products by oneDNN")
        else:
            torch.set_float32_matmul_precision("highest")
            done.append(f"fp32 matrix products by torch's default: oneDNN's have {error:,.0f} times the error of fp32 on this CPU")
    log.info("CPU: %d threads%s", torch.get_num_threads(), "".join(f"; {what}" for what in done))


def product_error() -> float:
    """How far matrix products are off, those of a linear layer and its gradients and a batched one, as a multiple of what fp32 allows.

    Where every step of a sum of k products is rounded, its error is about eps sqrt(k) / 4, by the L2 norm of many sums: up to
    eps sqrt(k) is fp32. Inputs rounded to bf16 alone make 2^-9, a thousand times as much. Takes milliseconds, on matrices large enough
    to be cut into blocks.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = (torch.randn(shape, generator=generator) for shape in ((128, 512), (256, 512), (128, 256)))
    batch = torch.randn(2, 8, 64, 64, generator=generator)
    products = ((x, weight.T), (gradient, weight), (gradient.T, x), (batch[0], batch[1]))
    return max(_error(a, b) / (torch.finfo(torch.float32).eps * a.shape[-1] ** 0.5) for a, b in products)


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    exact = a.double() @ b.double()
    return float(((a @ b).double() - exact).norm() / exact.norm())


def _set_malloc(settings: dict[int, int]) -> bool:
    """False where the C library isn't glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings.items())

