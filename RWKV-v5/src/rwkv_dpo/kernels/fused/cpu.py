"""The functions of a block on CPUs, in C++ and OpenMP: csrc/fused_cpu.cpp."""

from functools import cache

import torch

from rwkv_dpo.kernels.agreement import Agreement
from rwkv_dpo.kernels.agreement import agreement as agreement_of
from rwkv_dpo.kernels.build import SOURCES, BuildError, load_library
from rwkv_dpo.kernels.compilers import cpp_recipe
from rwkv_dpo.kernels.cpp import CFLAGS
from rwkv_dpo.kernels.fused.compiled import ENTRY_POINTS
from rwkv_dpo.kernels.fused.compiled_newer import Functions
from rwkv_dpo.kernels.fused.parity import comparison

SOURCE = SOURCES / "fused_cpu.cpp"
STRIP = 64


def unusable_because(device: torch.device) -> str | None:
    """See rwkv_dpo.kernels.wkv5. Compiles the functions, and compares them with `plain`."""
    if device.type != "cpu":
        return "it runs on CPUs only"
    try:
        return agreement(device).fault
    except BuildError as error:
        return str(error)


def agreement(device: torch.device, again: bool = False) -> Agreement:
    """With `plain`; see rwkv_dpo.kernels.agreement. Raises BuildError."""
    return agreement_of(functions().library, device, comparison(functions(), device), again)


@cache
def functions() -> Functions:
    """Compiled on first use. BuildError."""
    return Functions(load_library(cpp_recipe(SOURCE, CFLAGS), ENTRY_POINTS), STRIP)
