"""Where a program runs and in which arithmetic; and CPU settings that make it faster and change no result."""

import ctypes
import logging
from pathlib import Path

import torch

from rwkv_dpo.errors import refuse

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
    """How fp32 matrix products are computed (exactly for fp32, in TF32 otherwise on a GPU), and memory handling on a CPU."""
    if device.type == "cpu":
        tune_cpu(keep_memory)
    else:
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")


def tune_cpu(keep_memory: bool) -> None:
    """Sets how freed memory is handled, and sends fp32 matrix products to the faster library; says what it did."""
    done = []
    # By default glibc does a bit of both: it hands large blocks back and faults them in again every step, and keeps blocks
    # below 32 MB in a heap that fragments, half as much again on top of the tensors.
    keep = {_M_MMAP_THRESHOLD: 1 << 30, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20}
    if _set_malloc(keep if keep_memory else {_M_MMAP_THRESHOLD: 1 << 20}):
        done.append(f"freed memory is {'kept for the next step' if keep_memory else 'given back at once'}")
    if not _has_amx():
        # "medium" lets torch use oneDNN, twice as fast as the default here and exact in fp32. On a CPU with AMX it would
        # round to bf16.
        torch.set_float32_matmul_precision("medium")
        done.append("fp32 matrix products by oneDNN")
    log.info("CPU: %d threads%s", torch.get_num_threads(), "".join(f"; {what}" for what in done))


def _set_malloc(settings: dict[int, int]) -> bool:
    """False where the C library isn't glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings.items())


def _has_amx() -> bool:
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # unknown: stay exact
