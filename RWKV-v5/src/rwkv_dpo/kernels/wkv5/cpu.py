"""WKV-5 on CPUs in C++ and OpenMP, compiled on first use: csrc/wkv5_cpu.cpp holds the mathematics."""

import torch
from torch.autograd.function import once_differentiable

from rwkv_dpo.kernels.backends import check_inputs, check_types
from rwkv_dpo.kernels.cpp import CppKernels

# Tokens that advance the state together. 4 keeps the sums in registers; 8 was no faster.
BLOCK = 4

KERNELS = CppKernels(
    "wkv5",
    (
        *("cu_seqlens", "parents", "r", "k", "v", "time_decay", "u", "state0", "y", "state_end"),
        *("gy", "g_state_end", "gr", "gk", "gv", "g_time_decay", "gu", "sums", "g_start", "g_end"),
    ),
    f"-DBLOCK={BLOCK}",
)
unusable_because, agreement = KERNELS.unusable_because, KERNELS.agreement


def wkv5(r, k, v, time_decay, u, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv5 for shapes. fp32 inside, on torch.get_num_threads() threads; the same result for any number of them."""
    check_inputs("cpu", {"r": r, "k": k, "v": v}, cu_seqlens, state0, per_head={"time_decay": time_decay, "u": u})
    return _Wkv5.apply(r, k, v, time_decay, u, cu_seqlens.to(torch.int32), None, state0)


def _wkv5_of_forest(r, k, v, time_decay, u, cu_seqlens, parents, state0=None):
    """See rwkv_dpo.kernels.wkv5."""
    check_types("cpu", {"r": r, "k": k, "v": v}, per_head={"time_decay": time_decay, "u": u})
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
        KERNELS.forward(**inputs, y=y, state_end=state_end)
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
        KERNELS.backward(
            cu_seqlens=cu_seqlens, parents=parents, r=r, k=k, v=v, time_decay=time_decay, u=u, state0=state0,
            state_end=state_end, gy=torch.zeros_like(r) if gy is None else gy.contiguous(),
            g_state_end=None if g_state_end is None else g_state_end.contiguous(),
            gr=gr, gk=gk, gv=gv, g_time_decay=g_time_decay, gu=gu, sums=u.new_empty(2, *states[:3]), g_start=g_start,
            g_end=None if parents is None else u.new_empty(states),
        )  # fmt: skip
        g_state0 = g_start[: len(state0)] if g_start is not None and ctx.needs_input_grad[7] else None
        return gr, gk, gv, g_time_decay.to(ctx.dtypes[0]), gu.to(ctx.dtypes[1]), None, None, g_state0
