"""WKV-5 on CPUs in C++ and OpenMP, compiled on first use: csrc/wkv5_cpu.cpp holds the mathematics."""

import ctypes
from functools import cache

import torch
from torch.autograd.function import once_differentiable

from rwkv_dpo.kernels.build import SOURCES, BuildError, EntryPoint, load_library
from rwkv_dpo.kernels.compilers import cpp_recipe
from rwkv_dpo.kernels.wkv5.common import DTYPES, check_inputs, decay_rate

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
                *("cu_seqlens", "r", "k", "v", "powers", "u", "state0", "y", "state_end"),
                *("gy", "g_state_end", "gr", "gk", "gv", "gw", "gu", "g_state0"),
            )
        ),
    )


ENTRY_POINTS = {name: EntryPoint(None, (ctypes.POINTER(Call),)) for name in ("wkv5_forward", "wkv5_backward")}


def unusable_because(device: torch.device) -> str | None:
    """See rwkv_dpo.kernels.wkv5. Compiles the kernel."""
    if device.type != "cpu":
        return "it runs on CPUs only"
    try:
        _library()
    except BuildError as error:
        return str(error)
    return None


def wkv5(r, k, v, time_decay, u, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv5 for shapes. fp32 inside, on torch.get_num_threads() threads; the same result for any number of them."""
    check_inputs("cpu", r, k, v, time_decay, u, cu_seqlens, state0)
    return _Wkv5.apply(r, k, v, time_decay, u, cu_seqlens, state0)


class _Wkv5(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, time_decay, u, cu_seqlens, state0):
        ctx.set_materialize_grads(False)
        n_seqs, (_, n_heads, head_size) = cu_seqlens.numel() - 1, r.shape
        inputs = {
            "cu_seqlens": cu_seqlens.to(torch.int32).contiguous(),
            **{name: x.contiguous() for name, x in (("r", r), ("k", k), ("v", v))},
            "powers": _powers_of_w(time_decay),
            "u": u.float().contiguous(),
            "state0": None if state0 is None else state0.float().contiguous(),
        }
        y = torch.empty_like(inputs["r"])
        state_end = r.new_empty(n_seqs, n_heads, head_size, head_size, dtype=torch.float32)
        _run("wkv5_forward", **inputs, y=y, state_end=state_end)
        ctx.save_for_backward(time_decay, u, *inputs.values())
        return y, state_end

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_state_end):
        time_decay, original_u, cu_seqlens, r, k, v, powers, u, state0 = ctx.saved_tensors
        n_seqs, (_, n_heads, head_size) = cu_seqlens.numel() - 1, r.shape
        gr, gk, gv = torch.empty_like(r), torch.empty_like(k), torch.empty_like(v)
        gw, gu = (u.new_empty(n_seqs, n_heads, head_size) for _ in range(2))
        g_state0 = torch.empty_like(state0) if ctx.needs_input_grad[6] else None
        _run(
            "wkv5_backward", cu_seqlens=cu_seqlens, r=r, k=k, v=v, powers=powers, u=u, state0=state0,
            gy=torch.zeros_like(r) if gy is None else gy.contiguous(),
            g_state_end=None if g_state_end is None else g_state_end.contiguous(),
            gr=gr, gk=gk, gv=gv, gw=gw, gu=gu, g_state0=g_state0,
        )
        # w = exp(-exp(time_decay)), so dw / d time_decay = -exp(time_decay) w.
        rate = decay_rate(time_decay.double())
        g_time_decay = gw.sum(0) * (-rate * torch.exp(-rate))
        return gr, gk, gv, g_time_decay.to(time_decay.dtype), gu.sum(0).to(original_u.dtype), None, g_state0


def _powers_of_w(time_decay: torch.Tensor) -> torch.Tensor:
    """w^0 .. w^BLOCK, fp32 [H, BLOCK + 1, N]; rounded once from float64, as w itself is too near 1 for its powers to be exact."""
    exponents = torch.arange(BLOCK + 1, dtype=torch.float64)
    return torch.exp(-decay_rate(time_decay.double())[:, None, :] * exponents[:, None]).float().contiguous()


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
