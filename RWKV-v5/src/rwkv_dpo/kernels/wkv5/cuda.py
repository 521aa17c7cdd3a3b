"""WKV-5 on NVIDIA GPUs, parallel over the segments of every sequence. csrc/wkv5_cuda.cu says how, and at what cost.

The forward keeps the state at the start of every segment for the backward, fp32 [n_segments, H, N, N]: at head size 64 as much
memory as one fp32 activation of the layer, about 7 % of what a block keeps in bf16. Recomputing them instead would repeat two of
the three forward launches, roughly a tenth of the time of forward and backward.
"""

import ctypes
from contextlib import nullcontext
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_dpo.kernels.agreement import Agreement
from rwkv_dpo.kernels.agreement import agreement as agreement_of
from rwkv_dpo.kernels.backends import DTYPES, bytes_of, check_inputs
from rwkv_dpo.kernels.build import SOURCES, EntryPoint
from rwkv_dpo.kernels.cuda_library import cannot_run_because, load_kernels
from rwkv_dpo.kernels.parity import comparison
from rwkv_dpo.kernels.wkv5.reference import decay_rate

# Tokens per segment. Half as many would double the parallelism and, with it, the 0.18 GB of states that 4096 tokens of 16 heads of
# 64 move in a forward and backward.
SEGMENT = 64


class Layout(ctypes.Structure):
    """What every launch needs to know; mirrors `Layout` in csrc/wkv5_cuda.cu."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("dtype", "n_sequences", "n_segments", "n_heads", "head_size")),
        *((name, ctypes.c_void_p) for name in ("segments", "first_segment", "time_decay", "u", "stream")),
    )


# Tensors as wkv5_forward and wkv5_backward in csrc/wkv5_cuda.cu name them.
FORWARD = ("r", "k", "v", "state0", "states", "y", "state_end")
BACKWARD = ("r", "k", "v", "gy", "states", "gstate_end", "state_grads", "gr", "gk", "gv", "gw", "gu", "gstate0")

ENTRY_POINTS = {
    "wkv5_forward": EntryPoint(ctypes.c_int, (ctypes.POINTER(Layout), *len(FORWARD) * [ctypes.c_void_p])),
    "wkv5_backward": EntryPoint(ctypes.c_int, (ctypes.POINTER(Layout), *len(BACKWARD) * [ctypes.c_void_p])),
    "wkv5_error": EntryPoint(ctypes.c_char_p, (ctypes.c_int,)),
    "wkv5_usable": EntryPoint(ctypes.c_int, ()),
}


class Segments(NamedTuple):
    """Where the segments lie: rows (first row, length) int32 [n_segments, 2], and the first segment of every sequence,
    int32 [n + 1], both on the device."""

    rows: Tensor
    first: Tensor


def unusable_because(device: torch.device) -> str | None:
    """See rwkv_dpo.kernels.wkv5. Compiles the kernels, and compares them with the reference."""
    return cannot_run_because(device, _library, "wkv5") or agreement(device).fault


def agreement(device: torch.device, again: bool = False) -> Agreement:
    """With the reference; see rwkv_dpo.kernels.agreement. Raises BuildError."""
    return agreement_of(_library(), device, comparison("5", wkv5, device), again)


def wkv5(
    r: Tensor, k: Tensor, v: Tensor, time_decay: Tensor, u: Tensor, cu_seqlens: Tensor, state0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See rwkv_dpo.kernels.wkv5 for the contract."""
    return wkv5_with(_library(), r, k, v, time_decay, u, cu_seqlens, state0)


def wkv5_with(
    library: ctypes.CDLL, r: Tensor, k: Tensor, v: Tensor, time_decay: Tensor, u: Tensor, cu_seqlens: Tensor, state0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """wkv5 by a build of csrc/wkv5_cuda.cu. Tests hand in one that runs on the CPU."""
    check_inputs("cuda", {"r": r, "k": k, "v": v}, cu_seqlens, state0, per_head={"time_decay": time_decay, "u": u})
    segments = _segments(bytes_of(cu_seqlens), r.device)
    floats = (time_decay.float(), u.float(), None if state0 is None else state0.float())
    return _Wkv5.apply(library, segments, *(None if x is None else _aligned(x) for x in (r, k, v, *floats)))


class _Wkv5(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, segments, r, k, v, time_decay, u, state0):
        _, n_heads, head_size = r.shape
        states = r.new_empty(len(segments.rows), n_heads, head_size, head_size, dtype=torch.float32)
        y = torch.empty_like(r)
        state_end = r.new_empty(len(segments.first) - 1, n_heads, head_size, head_size, dtype=torch.float32)
        _call(library, library.wkv5_forward, segments, time_decay, u, r, k, v, state0, states, y, state_end)
        ctx.library, ctx.segments = library, segments
        ctx.save_for_backward(r, k, v, time_decay, u, states)
        ctx.set_materialize_grads(False)
        return y, state_end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, gstate_end):
        r, k, v, time_decay, u, states = ctx.saved_tensors
        _, n_heads, head_size = r.shape
        gy = torch.zeros_like(r) if gy is None else _aligned(gy)
        gstate_end = None if gstate_end is None else _aligned(gstate_end)
        gr, gk, gv = torch.empty_like(r), torch.empty_like(k), torch.empty_like(v)
        state_grads = torch.empty_like(states)
        # One row per segment, summed here: no atomics, so that a run repeats bit by bit.
        gw, gu = states.new_empty(2, len(states), n_heads, head_size)
        gstate0 = None
        if ctx.needs_input_grad[7]:
            gstate0 = states.new_empty(len(ctx.segments.first) - 1, n_heads, head_size, head_size)
        _call(
            ctx.library, ctx.library.wkv5_backward, ctx.segments, time_decay, u,
            r, k, v, gy, states, gstate_end, state_grads, gr, gk, gv, gw, gu, gstate0,
        )
        # w = exp(-rate).
        rate = decay_rate(time_decay)
        gtime_decay = gw.sum(0) * -rate * (-rate).exp()
        return None, None, gr, gk, gv, gtime_decay, gu.sum(0), gstate0


def _call(library, function, segments: Segments, time_decay: Tensor, u: Tensor, *tensors: Tensor | None) -> None:
    """Queue the launches of one direction on the current stream; RuntimeError when CUDA refuses one."""
    r = tensors[0]
    assert r is not None
    on_gpu = r.is_cuda
    with torch.cuda.device(r.device) if on_gpu else nullcontext():
        layout = Layout(
            DTYPES[r.dtype], len(segments.first) - 1, len(segments.rows), r.shape[1], r.shape[2],
            segments.rows.data_ptr(), segments.first.data_ptr(), time_decay.data_ptr(), u.data_ptr(),
            torch.cuda.current_stream(r.device).cuda_stream if on_gpu else None,
        )
        code = function(ctypes.byref(layout), *(None if x is None else x.data_ptr() for x in tensors))
    if code != 0:
        raise RuntimeError(f"WKV-5 kernels: {library.wkv5_error(code).decode()} (CUDA error {code})")


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and on a 16-byte boundary: the kernels load quads. A copy is made of odd views only."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


# The layers of a model share their batch's table; a few more are kept for forests, where every level has its own.
@lru_cache(maxsize=64)
def _segments(cu_seqlens: bytes, device: torch.device) -> Segments:
    bounds = torch.frombuffer(bytearray(cu_seqlens), dtype=torch.int32).long()
    lengths = bounds.diff()
    counts = (lengths + SEGMENT - 1) // SEGMENT
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    number = torch.arange(int(first[-1])) - first[:-1].repeat_interleave(counts)
    rows = bounds[:-1].repeat_interleave(counts) + number * SEGMENT
    ends = bounds[1:].repeat_interleave(counts)
    table = torch.stack([rows, (ends - rows).clamp(max=SEGMENT)], dim=1)
    # Together, and without waiting: a blocking copy would wait for all that the device has been given to do.
    both = torch.cat([table.flatten(), first]).int().to(device, non_blocking=True)
    return Segments(both[: table.numel()].view(-1, 2), both[table.numel() :])


@cache
def _library() -> ctypes.CDLL:
    return load_kernels(SOURCES / "wkv5_cuda.cu", ENTRY_POINTS)
