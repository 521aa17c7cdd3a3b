"""WKV-7 on CPUs in C++ and OpenMP, compiled on first use: csrc/wkv7_cpu.cpp holds the mathematics."""

import torch
from torch.autograd.function import once_differentiable

from rwkv_dpo.kernels.backends import check_inputs
from rwkv_dpo.kernels.cpp import CppKernels

KERNELS = CppKernels(
    "wkv7",
    (
        *("cu_seqlens", "r", "k", "v", "a", "b", "w", "state0", "y", "state_end"),
        *("gy", "g_state_end", "gr", "gk", "gv", "ga", "gb", "g_log_w", "g_state0"),
    ),
)
unusable_because, agreement = KERNELS.unusable_because, KERNELS.agreement


def wkv7(r, k, v, a, b, log_w, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv7 for shapes. fp32 inside, on torch.get_num_threads() threads; the same result for any number of them."""
    check_inputs("cpu", {"r": r, "k": k, "v": v, "a": a, "b": b}, cu_seqlens, state0, decays={"log_w": log_w})
    return _Wkv7.apply(r, k, v, a, b, log_w, cu_seqlens, state0)


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, a, b, log_w, cu_seqlens, state0):
        ctx.set_materialize_grads(False)
        rows = [x.contiguous() for x in (r, k, v, a, b)]
        state0 = None if state0 is None else state0.float().contiguous()
        y, state_end = KERNELS.run_forward(dict(zip("rkvab", rows, strict=True)), log_w, cu_seqlens, state0=state0)
        # log w and not w: who made it keeps it anyway.
        ctx.save_for_backward(*rows, log_w, state0, cu_seqlens)
        return y, state_end

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_state_end):
        *rows, log_w, state0, cu_seqlens = ctx.saved_tensors
        g_state0 = torch.empty_like(state0) if ctx.needs_input_grad[7] else None
        named = dict(zip("rkvab", rows, strict=True))
        grads = KERNELS.run_backward(named, log_w, cu_seqlens, gy, g_state_end, state0=state0, g_state0=g_state0)
        return *grads, None, g_state0
