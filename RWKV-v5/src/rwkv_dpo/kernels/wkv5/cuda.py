"""WKV-5 on NVIDIA GPUs, parallel over the segments of every sequence. csrc/wkv5_cuda.cu says how, and at what cost.

The forward keeps the state at the start of every segment for the backward, fp32 [n_segments, H, N, N]: at head size 64 as much
memory as one fp32 activation of the layer, about 7 % of what a block keeps in bf16. Recomputing them instead would repeat two of
the three forward launches, roughly a tenth of the time of forward and backward.
"""

import torch
from torch import Tensor

from rwkv_dpo.kernels.backends import check_inputs
from rwkv_dpo.kernels.cuda_library import CudaKernels, aligned, new_states
from rwkv_dpo.kernels.wkv5.reference import decay_rate

# Tokens per segment. Half as many would double the parallelism and, with it, the 0.18 GB of states that 4096 tokens of 16 heads of
# 64 move in a forward and backward.
SEGMENT = 64

KERNELS = CudaKernels(
    "wkv5", SEGMENT,
    forward=("time_decay", "u", "r", "k", "v", "state0", "states", "y", "state_end"),
    backward=(
        *("time_decay", "u", "r", "k", "v", "gy", "states", "gstate_end", "state_grads"),
        *("gr", "gk", "gv", "gw", "gu", "gstate0"),
    ),
)  # fmt: skip
unusable_because, agreement = KERNELS.unusable_because, KERNELS.agreement


def wkv5(
    r: Tensor, k: Tensor, v: Tensor, time_decay: Tensor, u: Tensor, cu_seqlens: Tensor, state0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See rwkv_dpo.kernels.wkv5 for the contract."""
    check_inputs("cuda", {"r": r, "k": k, "v": v}, cu_seqlens, state0, per_head={"time_decay": time_decay, "u": u})
    segments = KERNELS.segments(cu_seqlens, r.device)
    floats = (time_decay.float(), u.float(), None if state0 is None else state0.float())
    return _Wkv5.apply(segments, *(None if x is None else aligned(x) for x in (r, k, v, *floats)))


class _Wkv5(torch.autograd.Function):
    @staticmethod
    def forward(ctx, segments, r, k, v, time_decay, u, state0):
        y, state_end, states = torch.empty_like(r), new_states(r, len(segments.first) - 1), new_states(r, len(segments.rows))
        KERNELS.run(
            "forward", segments, time_decay=time_decay, u=u, r=r, k=k, v=v, state0=state0, states=states, y=y, state_end=state_end
        )
        ctx.segments = segments
        ctx.save_for_backward(r, k, v, time_decay, u, states)
        ctx.set_materialize_grads(False)
        return y, state_end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, gstate_end):
        r, k, v, time_decay, u, states = ctx.saved_tensors
        gr, gk, gv = torch.empty_like(r), torch.empty_like(k), torch.empty_like(v)
        # One row per segment, summed here: no atomics, so that a run repeats bit by bit.
        gw, gu = states.new_empty(2, len(states), *u.shape)
        gstate0 = new_states(r, len(ctx.segments.first) - 1) if ctx.needs_input_grad[6] else None
        KERNELS.run(
            "backward", ctx.segments, time_decay=time_decay, u=u, r=r, k=k, v=v, gy=torch.zeros_like(r) if gy is None else aligned(gy),
            states=states, gstate_end=None if gstate_end is None else aligned(gstate_end), state_grads=torch.empty_like(states),
            gr=gr, gk=gk, gv=gv, gw=gw, gu=gu, gstate0=gstate0,
        )  # fmt: skip
        # w = exp(-rate).
        rate = decay_rate(time_decay)
        gtime_decay = gw.sum(0) * -rate * (-rate).exp()
        return None, gr, gk, gv, gtime_decay, gu.sum(0), gstate0
