"""WKV-5 by a plain kernel, one block per (sequence, head): what rwkv_dpo.kernels.wkv5.cuda is measured against. Same contract."""

import ctypes
from functools import cache, lru_cache
from pathlib import Path

import torch
from rwkv_dpo.kernels.backends import DTYPES, check_inputs
from rwkv_dpo.kernels.build import EntryPoint
from rwkv_dpo.kernels.cuda_library import load_kernels
from rwkv_dpo.kernels.wkv5.reference import decay_rate
from torch import Tensor

SOURCE = Path(__file__).parent / "csrc" / "wkv5_sequential.cu"

# The order in which csrc/wkv5_sequential.cu expects them.
POINTERS = ("r", "k", "v", "gy", "y", "gr", "gk", "gv", "state0", "gstate_end", "state_end", "gw", "gu", "gstate0")


class Layout(ctypes.Structure):
    """Mirrors `Layout` in csrc/wkv5_sequential.cu."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("dtype", "n_sequences", "n_heads", "head_size")),
        *((name, ctypes.c_void_p) for name in ("cu_seqlens", "w", "u", "stream")),
    )


ENTRY_POINTS = {
    "wkv5_sequential": EntryPoint(ctypes.c_int, (ctypes.POINTER(Layout), ctypes.c_int, ctypes.POINTER(ctypes.c_void_p))),
}


def wkv5(
    r: Tensor, k: Tensor, v: Tensor, time_decay: Tensor, u: Tensor, cu_seqlens: Tensor, state0: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See rwkv_dpo.kernels.wkv5 for the contract; CUDA tensors only."""
    return wkv5_with(_library(), r, k, v, time_decay, u, cu_seqlens, state0)


@cache
def _library() -> ctypes.CDLL:
    return load_kernels(SOURCE, ENTRY_POINTS)


def wkv5_with(library, r, k, v, time_decay, u, cu_seqlens, state0=None):
    """wkv5 by a build of csrc/wkv5_sequential.cu."""
    check_inputs("sequential", {"r": r, "k": k, "v": v}, cu_seqlens, state0, per_head={"time_decay": time_decay, "u": u})
    w = torch.exp(-decay_rate(time_decay.float()))
    bounds = _on_device(cu_seqlens.to(torch.int32).numpy().tobytes(), r.device)
    return _Sequential.apply(library, bounds, *(x.contiguous() for x in (r, k, v, w, u.float())), state0)


class _Sequential(torch.autograd.Function):
    @staticmethod
    def forward(ctx, library, bounds, r, k, v, w, u, state0):
        _, n_heads, head_size = r.shape
        y = torch.empty_like(r)
        state_end = w.new_empty(len(bounds) - 1, n_heads, head_size, head_size)
        state0 = None if state0 is None else state0.float().contiguous()
        _run(library, False, bounds, w, u, r=r, k=k, v=v, state0=state0, y=y, state_end=state_end)
        ctx.library, ctx.bounds = library, bounds
        ctx.save_for_backward(r, k, v, w, u, state0)
        ctx.set_materialize_grads(False)
        return y, state_end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gy, gstate_end):
        r, k, v, w, u, state0 = ctx.saved_tensors
        n_sequences, (_, n_heads, head_size) = len(ctx.bounds) - 1, r.shape
        gr, gk, gv = torch.empty_like(r), torch.empty_like(k), torch.empty_like(v)
        gw, gu = w.new_empty(2, n_sequences, n_heads, head_size)
        gstate0 = w.new_empty(n_sequences, n_heads, head_size, head_size)
        _run(
            ctx.library, True, ctx.bounds, w, u, r=r, k=k, v=v, state0=state0,
            gy=torch.zeros_like(r) if gy is None else gy.contiguous(),
            gstate_end=None if gstate_end is None else gstate_end.contiguous(),
            gr=gr, gk=gk, gv=gv, gw=gw, gu=gu, gstate0=gstate0,
        )
        return None, None, gr, gk, gv, gw.sum(0), gu.sum(0), None if state0 is None else gstate0


def _run(library, backward: bool, bounds: Tensor, w: Tensor, u: Tensor, **tensors: Tensor | None) -> None:
    r = tensors["r"]
    assert r is not None
    stream = torch.cuda.current_stream(r.device).cuda_stream if r.is_cuda else None
    layout = Layout(DTYPES[r.dtype], len(bounds) - 1, r.shape[1], r.shape[2], bounds.data_ptr(), w.data_ptr(), u.data_ptr(), stream)
    given = {name: x.data_ptr() for name, x in tensors.items() if x is not None}
    pointers = (ctypes.c_void_p * len(POINTERS))(*map(given.get, POINTERS))
    code = library.wkv5_sequential(ctypes.byref(layout), int(backward), pointers)
    if code != 0:
        raise RuntimeError(f"sequential WKV-5 kernel: CUDA error {code}")


@lru_cache(maxsize=8)
def _on_device(cu_seqlens: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(cu_seqlens), dtype=torch.int32).to(device)
