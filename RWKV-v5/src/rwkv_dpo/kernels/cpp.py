"""What the C++ backends share: how they are compiled on first use, and called."""

import ctypes
import importlib
from functools import cached_property

import torch
from torch import Tensor

from rwkv_dpo.kernels.agreement import Agreement
from rwkv_dpo.kernels.agreement import agreement as agreement_of
from rwkv_dpo.kernels.backends import DTYPES
from rwkv_dpo.kernels.build import SOURCES, BuildError, EntryPoint, load_library
from rwkv_dpo.kernels.compilers import cpp_recipe
from rwkv_dpo.kernels.parity import comparison

# OpenMP is compiled for but not linked: its symbols resolve to the library that torch has loaded, so there is one thread pool.
# No -ffast-math: it would switch off subnormal numbers for the whole process and NaN with them.
CFLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")


class CppKernels:
    """The functions NAME_forward and NAME_backward of csrc/NAME_cpu.cpp. Both take a pointer to one structure: five int32 (threads,
    sequences, heads, head size, code of the rows' type), then the pointers in the order given here, null where there is no tensor."""

    def __init__(self, name: str, pointers: tuple[str, ...], *flags: str) -> None:
        self.name, self.folder, self.flags = name, SOURCES, flags
        numbers = ("n_threads", "n_seqs", "n_heads", "head_size", "dtype")
        fields = [*((number, ctypes.c_int32) for number in numbers), *((pointer, ctypes.c_void_p) for pointer in pointers)]
        self._call = type("Call", (ctypes.Structure,), {"_fields_": fields})

    @cached_property
    def library(self) -> ctypes.CDLL:
        """Compiled when no build of it is there. BuildError."""
        entry_point = EntryPoint(None, (ctypes.POINTER(self._call),))
        functions = (f"{self.name}_forward", f"{self.name}_backward")
        return load_library(cpp_recipe(self.folder / f"{self.name}_cpu.cpp", (*CFLAGS, *self.flags)), dict.fromkeys(functions, entry_point))

    def unusable_because(self, device: torch.device) -> str | None:
        """The reason, in one line, or None where the kernels run. Compiles them, and compares them with the reference."""
        if device.type != "cpu":
            return "it runs on CPUs only"
        try:
            return self.agreement(device).fault
        except BuildError as error:
            return str(error)

    def agreement(self, device: torch.device, again: bool = False) -> Agreement:
        """With the reference; see rwkv_dpo.kernels.agreement. Raises BuildError."""
        wkv = getattr(importlib.import_module(f"rwkv_dpo.kernels.{self.name}.cpu"), self.name)
        return agreement_of(self.library, device, comparison(self.name.removeprefix("wkv"), wkv, device), again)

    def forward(self, **tensors: Tensor | None) -> None:
        """Fills the tensors that are outputs. All are contiguous, on the CPU, and of the shapes that the source says."""
        self._run("forward", tensors)

    def backward(self, **tensors: Tensor | None) -> None:
        """The same for gradients."""
        self._run("backward", tensors)

    def run_forward(
        self, rows: dict[str, Tensor], log_w: Tensor, cu_seqlens: Tensor, **others: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y and state_end of a recurrence in which each token has its decay. rows [S, H, N] by name, contiguous."""
        r, n_seqs = rows["r"], cu_seqlens.numel() - 1
        y = torch.empty_like(r)
        state_end = r.new_empty(n_seqs, r.shape[1], r.shape[2], r.shape[2], dtype=torch.float32)
        self.forward(cu_seqlens=_int32(cu_seqlens), **rows, w=_w(log_w), **others, y=y, state_end=state_end)
        return y, state_end

    def run_backward(
        self, rows: dict[str, Tensor], log_w: Tensor, cu_seqlens: Tensor, gy: Tensor | None, g_state_end: Tensor | None,
        **others: Tensor | None,
    ) -> list[Tensor]:  # fmt: skip
        """The gradients of the rows, in their order, and of log w."""
        grads = {f"g{name}": torch.empty_like(x) for name, x in rows.items()}
        g_log_w = torch.empty(log_w.shape, dtype=torch.float32)
        self.backward(
            cu_seqlens=_int32(cu_seqlens), **rows, w=_w(log_w), **others, **grads, g_log_w=g_log_w,
            gy=torch.zeros_like(rows["r"]) if gy is None else gy.contiguous(),
            g_state_end=None if g_state_end is None else g_state_end.contiguous(),
        )  # fmt: skip
        return [*grads.values(), g_log_w.to(log_w.dtype)]

    def _run(self, direction: str, tensors: dict[str, Tensor | None]) -> None:
        r, cu_seqlens = tensors["r"], tensors["cu_seqlens"]
        assert r is not None
        assert cu_seqlens is not None
        call = self._call(
            n_threads=torch.get_num_threads(), n_seqs=cu_seqlens.numel() - 1, n_heads=r.shape[1], head_size=r.shape[2],
            dtype=DTYPES[r.dtype], **{name: x.data_ptr() for name, x in tensors.items() if x is not None},
        )  # fmt: skip
        getattr(self.library, f"{self.name}_{direction}")(ctypes.byref(call))


def _w(log_w: Tensor) -> Tensor:
    return log_w.float().exp().contiguous()


def _int32(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.to(torch.int32).contiguous()
