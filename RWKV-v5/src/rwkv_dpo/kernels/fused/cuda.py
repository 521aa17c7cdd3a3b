"""The functions of a block on NVIDIA GPUs: csrc/fused_cuda.cu."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from rwkv_dpo.kernels.agreement import Agreement
from rwkv_dpo.kernels.agreement import agreement as agreement_of
from rwkv_dpo.kernels.build import SOURCES, EntryPoint
from rwkv_dpo.kernels.cuda_library import cannot_run_because, load_kernels
from rwkv_dpo.kernels.fused.compiled import ENTRY_POINTS
from rwkv_dpo.kernels.fused.compiled_newer import Functions
from rwkv_dpo.kernels.fused.parity import comparison

SOURCE = SOURCES / "fused_cuda.cu"
CUDA_ENTRY_POINTS = {**ENTRY_POINTS, "kernels_usable": EntryPoint(ctypes.c_int, ())}

# Rows that a block of threads takes one after the other: 4,096 rows make 512 blocks, four for each multiprocessor of an H100.
STRIP = 8
# A thread has four channels, and a block 1,024 threads; in fp32 768, which may use more registers.
MAX_CHANNELS = {torch.float32: 3072, torch.bfloat16: 4096, torch.float16: 4096}


def unusable_because(device: torch.device) -> str | None:
    """See rwkv_dpo.kernels.wkv5. Compiles the kernels, and compares them with `plain`."""
    return cannot_run_because(device, _library) or agreement(device).fault


def agreement(device: torch.device, again: bool = False) -> Agreement:
    """With `plain`; see rwkv_dpo.kernels.agreement. Raises BuildError."""
    return agreement_of(_library(), device, comparison(functions(), device), again)


def takes(x: Tensor) -> bool:
    """Whether the kernels have the type and the width of rows x [S, ...]."""
    return x.shape[-1] % 4 == 0 and x.shape[1:].numel() <= MAX_CHANNELS.get(x.dtype, 0)


@cache
def functions() -> Functions:
    """Compiled on first use. BuildError."""
    return Functions(_library(), STRIP)


@cache
def _library() -> ctypes.CDLL:
    return load_kernels(SOURCE, CUDA_ENTRY_POINTS)
