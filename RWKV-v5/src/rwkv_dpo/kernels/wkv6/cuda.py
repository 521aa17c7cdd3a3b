"""WKV-6 on NVIDIA GPUs: csrc/wkv6_cuda.cu says how."""

import torch
from torch.autograd.function import once_differentiable

from rwkv_dpo.kernels.backends import check_inputs
from rwkv_dpo.kernels.cuda_library import aligned
from rwkv_dpo.kernels.cuda_walk import WalkKernels

KERNELS = WalkKernels(
    "wkv6",
    forward=("r", "k", "v", "log_w", "u", "state0", "states", "y", "state_end"),
    backward=(
        *("r", "k", "v", "log_w", "u", "gy", "states", "g_state_end", "state_grads"),
        *("gr", "gk", "gv", "g_log_w", "gu", "g_state0"),
    ),
)
unusable_because, agreement = KERNELS.unusable_because, KERNELS.agreement


def wkv6(r, k, v, log_w, u, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv6 for shapes. fp32 inside; a run repeats bit by bit."""
    check_inputs("cuda", {"r": r, "k": k, "v": v}, cu_seqlens, state0, decays={"log_w": log_w}, per_head={"u": u})
    segments = KERNELS.segments(cu_seqlens, r.device)
    floats = (log_w.float(), u.float(), None if state0 is None else state0.float())
    return _Wkv6.apply(segments, torch.is_grad_enabled(), *(None if x is None else aligned(x) for x in (r, k, v, *floats)))


class _Wkv6(torch.autograd.Function):
    @staticmethod
    def forward(ctx, segments, keeps, r, k, v, log_w, u, state0):
        ctx.set_materialize_grads(False)
        y, state_end, states = KERNELS.run_forward(segments, {"r": r, "k": k, "v": v}, keeps, log_w=log_w, u=u, state0=state0)
        ctx.segments = segments
        ctx.save_for_backward(r, k, v, log_w, u, states)
        return y, state_end

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_state_end):
        r, k, v, log_w, u, states = ctx.saved_tensors
        # One row per segment, summed here: no atomics, so that a run repeats bit by bit.
        gu = u.new_empty(len(states), *u.shape)
        grads, g_log_w, g_state0 = KERNELS.run_backward(
            ctx.segments, {"r": r, "k": k, "v": v}, states, gy, g_state_end, ctx.needs_input_grad[7], log_w=log_w, u=u, gu=gu
        )
        return None, None, *grads, g_log_w, gu.sum(0), g_state0
