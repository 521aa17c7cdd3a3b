"""WKV-7 on NVIDIA GPUs: csrc/wkv7_cuda.cu says how. What each token takes out of the state is kept for the backward, fp32 [S, H, N]."""

import torch
from torch.autograd.function import once_differentiable

from rwkv_dpo.kernels.backends import check_inputs
from rwkv_dpo.kernels.cuda_library import aligned
from rwkv_dpo.kernels.cuda_walk import WalkKernels

KERNELS = WalkKernels(
    "wkv7",
    forward=("r", "k", "v", "a", "b", "log_w", "state0", "states", "taken", "y", "state_end"),
    backward=(
        *("r", "k", "v", "a", "b", "log_w", "gy", "states", "taken", "g_state_end", "state_grads", "g_taken"),
        *("gr", "gk", "gv", "ga", "gb", "g_log_w", "g_state0"),
    ),
)
unusable_because, agreement = KERNELS.unusable_because, KERNELS.agreement


def wkv7(r, k, v, a, b, log_w, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv7 for shapes. fp32 inside; a run repeats bit by bit."""
    check_inputs("cuda", {"r": r, "k": k, "v": v, "a": a, "b": b}, cu_seqlens, state0, decays={"log_w": log_w})
    segments = KERNELS.segments(cu_seqlens, r.device)
    floats = (log_w.float(), None if state0 is None else state0.float())
    return _Wkv7.apply(segments, torch.is_grad_enabled(), *(None if x is None else aligned(x) for x in (r, k, v, a, b, *floats)))


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, segments, keeps, r, k, v, a, b, log_w, state0):
        ctx.set_materialize_grads(False)
        rows = dict(zip("rkvab", (r, k, v, a, b), strict=True))
        taken = torch.empty_like(log_w) if keeps else None
        y, state_end, states = KERNELS.run_forward(segments, rows, keeps, log_w=log_w, taken=taken, state0=state0)
        ctx.segments = segments
        ctx.save_for_backward(*rows.values(), log_w, states, taken)
        return y, state_end

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_state_end):
        *rows, log_w, states, taken = ctx.saved_tensors
        grads, g_log_w, g_state0 = KERNELS.run_backward(
            ctx.segments, dict(zip("rkvab", rows, strict=True)), states, gy, g_state_end, ctx.needs_input_grad[8],
            log_w=log_w, taken=taken, g_taken=torch.empty_like(taken),
        )  # fmt: skip
        return None, None, *grads, g_log_w, g_state0
