"""WKV-6 on CPUs in C++ and OpenMP, compiled on first use: csrc/wkv6_cpu.cpp holds the mathematics."""

import torch
from torch.autograd.function import once_differentiable

from rwkv_dpo.kernels.backends import check_inputs
from rwkv_dpo.kernels.cpp import CppKernels

KERNELS = CppKernels(
    "wkv6",
    ("cu_seqlens", "r", "k", "v", "w", "u", "state0", "y", "state_end", "gy", "g_state_end", "gr", "gk", "gv", "g_log_w", "gu", "g_state0"),
)
unusable_because, agreement = KERNELS.unusable_because, KERNELS.agreement


def wkv6(r, k, v, log_w, u, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv6 for shapes. fp32 inside, on torch.get_num_threads() threads; the same result for any number of them."""
    check_inputs("cpu", {"r": r, "k": k, "v": v}, cu_seqlens, state0, decays={"log_w": log_w}, per_head={"u": u})
    return _Wkv6.apply(r, k, v, log_w, u, cu_seqlens, state0)


class _Wkv6(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, log_w, u, cu_seqlens, state0):
        ctx.set_materialize_grads(False)
        rows = [x.contiguous() for x in (r, k, v)]
        floats = [None if x is None else x.float().contiguous() for x in (u, state0)]
        y, state_end = KERNELS.run_forward(dict(zip("rkv", rows, strict=True)), log_w, cu_seqlens, u=floats[0], state0=floats[1])
        # log w and not w: who made it keeps it anyway.
        ctx.save_for_backward(*rows, log_w, *floats, cu_seqlens)
        ctx.type_of_u = u.dtype
        return y, state_end

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_state_end):
        r, k, v, log_w, u, state0, cu_seqlens = ctx.saved_tensors
        gu = u.new_empty(cu_seqlens.numel() - 1, *u.shape)
        g_state0 = torch.empty_like(state0) if ctx.needs_input_grad[6] else None
        grads = KERNELS.run_backward(
            {"r": r, "k": k, "v": v}, log_w, cu_seqlens, gy, g_state_end, u=u, state0=state0, gu=gu, g_state0=g_state0
        )  # fmt: skip
        return *grads, gu.sum(0).to(ctx.type_of_u), None, g_state0
