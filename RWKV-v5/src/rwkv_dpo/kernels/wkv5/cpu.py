"""WKV-5 on CPUs in C++ and OpenMP, compiled on first use: csrc/wkv5_cpu.cpp holds the mathematics."""

import ctypes
from functools import cache

import torch
from torch.autograd.function import once_differentiable

from rwkv_dpo.kernels.agreement import Agreement
from rwkv_dpo.kernels.agreement import agreement as agreement_of
from rwkv_dpo.kernels.build import SOURCES, BuildError, EntryPoint, load_library
from rwkv_dpo.kernels.compilers import cpp_recipe
from rwkv_dpo.kernels.wkv5.common import DTYPES, check_inputs, check_types
from rwkv_dpo.kernels.wkv5.parity import comparison

# Tokens that advance the state together. 4 keeps the sums in registers; 8 was no faster.
BLOCK = 4

# OpenMP is compiled for but not linked: its symbols resolve to the library that torch has loaded, so there is one thread pool.
# No -ffast-math: it would switch off subnormal numbers for the whole process and NaN with them.
CFLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", f"-DBLOCK={BLOCK}")


class Call(ctypes.Structure):
    """The arguments of both C++ functions; csrc/wkv5_cpu.cpp says what each one is."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("n_threads", "n_seqs", "n_heads", "head_size", "dtype")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("cu_seqlens", "parents", "r", "k", "v", "time_decay", "u", "state0", "y", "state_end"),
                *("gy", "g_state_end", "gr", "gk", "gv", "g_time_decay", "gu", "sums", "g_start", "g_end"),
            )
        ),
    )


ENTRY_POINTS = {name: EntryPoint(None, (ctypes.POINTER(Call),)) for name in ("wkv5_forward", "wkv5_backward")}


def unusable_because(device: torch.device) -> str | None:
    """See rwkv_dpo.kernels.wkv5. Compiles the kernel, and compares it with the reference."""
    if device.type != "cpu":
        return "it runs on CPUs only"
    try:
        return agreement(device).fault
    except BuildError as error:
        return str(error)


def agreement(device: torch.device, again: bool = False) -> Agreement:
    """With the reference; see rwkv_dpo.kernels.agreement. Raises BuildError."""
    return agreement_of(_library(), device, comparison(wkv5, device), again)


def wkv5(r, k, v, time_decay, u, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv5 for shapes. fp32 inside, on torch.get_num_threads() threads; the same result for any number of them."""
    check_inputs("cpu", r, k, v, time_decay, u, cu_seqlens, state0)
    return _Wkv5.apply(r, k, v, time_decay, u, cu_seqlens.to(torch.int32), None, state0)


def _wkv5_of_forest(r, k, v, time_decay, u, cu_seqlens, parents, state0=None):
    """See rwkv_dpo.kernels.wkv5."""
    check_types("cpu", r, k, v, time_decay, u)
    return _Wkv5.apply(r, k, v, time_decay, u, cu_seqlens, parents, state0)


wkv5.of_forest = _wkv5_of_forest  # type: ignore[attr-defined]


class _Wkv5(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, time_decay, u, cu_seqlens, parents, state0):
        ctx.set_materialize_grads(False)
        n_seqs, (_, n_heads, head_size) = cu_seqlens.numel() - 1, r.shape
        inputs = {
            "cu_seqlens": cu_seqlens.contiguous(), "parents": parents,
            **{name: x.contiguous() for name, x in (("r", r), ("k", k), ("v", v))},
            "time_decay": time_decay.float().contiguous(), "u": u.float().contiguous(),
            "state0": None if state0 is None else state0.float().contiguous(),
        }  # fmt: skip
        y = torch.empty_like(inputs["r"])
        state_end = r.new_empty(n_seqs, n_heads, head_size, head_size, dtype=torch.float32)
        _run("wkv5_forward", **inputs, y=y, state_end=state_end)
        ctx.dtypes = time_decay.dtype, u.dtype
        ctx.save_for_backward(*inputs.values(), None if parents is None else state_end)
        return y, state_end

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_state_end):
        cu_seqlens, parents, r, k, v, time_decay, u, state0, state_end = ctx.saved_tensors
        n_seqs, (_, n_heads, head_size) = cu_seqlens.numel() - 1, r.shape
        states = (n_seqs, n_heads, head_size, head_size)
        gr, gk, gv = torch.empty_like(r), torch.empty_like(k), torch.empty_like(v)
        g_time_decay, gu = u.new_empty(2, n_heads, head_size).unbind()
        g_start = u.new_empty(states) if ctx.needs_input_grad[7] or parents is not None else None
        _run(
            "wkv5_backward", cu_seqlens=cu_seqlens, parents=parents, r=r, k=k, v=v, time_decay=time_decay, u=u, state0=state0,
            state_end=state_end, gy=torch.zeros_like(r) if gy is None else gy.contiguous(),
            g_state_end=None if g_state_end is None else g_state_end.contiguous(),
            gr=gr, gk=gk, gv=gv, g_time_decay=g_time_decay, gu=gu, sums=u.new_empty(2, *states[:3]), g_start=g_start,
            g_end=None if parents is None else u.new_empty(states),
        )  # fmt: skip
        g_state0 = g_start[: len(state0)] if ctx.needs_input_grad[7] else None
        return gr, gk, gv, g_time_decay.to(ctx.dtypes[0]), gu.to(ctx.dtypes[1]), None, None, g_state0


def _run(function: str, r: torch.Tensor, cu_seqlens: torch.Tensor, **others: torch.Tensor | None) -> None:
    tensors = {"r": r, "cu_seqlens": cu_seqlens, **others}
    call = Call(
        n_threads=torch.get_num_threads(), n_seqs=cu_seqlens.numel() - 1, n_heads=r.shape[1], head_size=r.shape[2],
        dtype=DTYPES[r.dtype], **{name: x.data_ptr() for name, x in tensors.items() if x is not None},
    )
    getattr(_library(), function)(ctypes.byref(call))


@cache
def _library() -> ctypes.CDLL:
    return load_library(cpp_recipe(SOURCES / "wkv5_cpu.cpp", CFLAGS), ENTRY_POINTS)
