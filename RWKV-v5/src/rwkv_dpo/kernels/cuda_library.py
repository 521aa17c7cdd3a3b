"""What the CUDA kernels share: their library, made for the devices of this machine, why it can't be used, and how recurrences call it."""

import ctypes
import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_dpo.kernels.agreement import Agreement
from rwkv_dpo.kernels.agreement import agreement as agreement_of
from rwkv_dpo.kernels.backends import DTYPES, bytes_of
from rwkv_dpo.kernels.build import SOURCES, BuildError, EntryPoint, load_library
from rwkv_dpo.kernels.compilers import cuda_recipe
from rwkv_dpo.kernels.parity import comparison


def load_kernels(source: Path, entry_points: Mapping[str, EntryPoint]) -> ctypes.CDLL:
    """A library of CUDA kernels for the devices of this machine, whatever each of them is. BuildError."""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return load_library(cuda_recipe(source, capabilities), entry_points)


def cannot_run_because(device: torch.device, load: Callable[[], ctypes.CDLL]) -> str | None:
    """The reason, in one line, or None. load: of the library, which says itself whether this driver takes it (csrc/driver.cuh)."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.version.hip is not None:
        return "this torch is built for AMD's GPUs (ROCm), and the kernels are CUDA"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    try:
        library = load()
    except BuildError as error:
        return str(error)
    if code := library.kernels_usable():
        return f"the kernels can't run with this driver: {library.kernels_error(code).decode()} (CUDA error {code})"
    return None


class Layout(ctypes.Structure):
    """Where tokens lie, and of what type and shape they are; mirrors `Layout` in csrc/wkv_cuda.cuh."""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("dtype", "n_sequences", "n_segments", "n_heads", "head_size")),
        *((name, ctypes.c_void_p) for name in ("segments", "first_segment", "stream")),
    )


class Segments(NamedTuple):
    """Where the segments lie: rows (first row, length) int32 [n_segments, 2], and the first segment of every sequence,
    int32 [n + 1], both on the device."""

    rows: Tensor
    first: Tensor


class CudaKernels:
    """The functions of csrc/NAME_cuda.cu for a recurrence over segments of so many tokens: NAME_forward and NAME_backward, which take a
    pointer to a Layout and then tensors in the order given here, null where there is none; and those of csrc/driver.cuh."""

    def __init__(self, name: str, segment: int, forward: Sequence[str], backward: Sequence[str]) -> None:
        self.name, self.segment, self.forward, self.backward = name, segment, forward, backward
        self.source = SOURCES / f"{name}_cuda.cu"
        self.entry_points = {
            **{
                f"{name}_{direction}": EntryPoint(ctypes.c_int, (ctypes.POINTER(Layout), *len(tensors) * [ctypes.c_void_p]))
                for direction, tensors in (("forward", forward), ("backward", backward))
            },
            "kernels_error": EntryPoint(ctypes.c_char_p, (ctypes.c_int,)),
            "kernels_usable": EntryPoint(ctypes.c_int, ()),
        }

    @cached_property
    def library(self) -> ctypes.CDLL:
        """Compiled when no build of it is there. BuildError. Tests put one in its place that runs on the CPU."""
        return load_kernels(self.source, self.entry_points)

    def unusable_because(self, device: torch.device) -> str | None:
        """See rwkv_dpo.kernels.wkv5. Compiles the kernels, and compares them with the reference."""
        return cannot_run_because(device, lambda: self.library) or self.agreement(device).fault

    def agreement(self, device: torch.device, again: bool = False) -> Agreement:
        """With the reference; see rwkv_dpo.kernels.agreement. Raises BuildError."""
        wkv = getattr(importlib.import_module(f"rwkv_dpo.kernels.{self.name}.cuda"), self.name)
        return agreement_of(self.library, device, comparison(self.name.removeprefix("wkv"), wkv, device), again)

    def segments(self, cu_seqlens: Tensor, device: torch.device) -> Segments:
        """Of packed sequences."""
        return _segments(bytes_of(cu_seqlens), device, self.segment)

    def run(self, direction: str, segments: Segments, **tensors: Tensor | None) -> None:
        """Queue the launches of "forward" or "backward" on the current stream; RuntimeError when CUDA refuses one. Tensors are aligned,
        and of the shapes that the source says."""
        r = tensors["r"]
        assert r is not None
        with torch.cuda.device(r.device) if r.is_cuda else nullcontext():
            layout = Layout(
                DTYPES[r.dtype], len(segments.first) - 1, len(segments.rows), r.shape[1], r.shape[2],
                segments.rows.data_ptr(), segments.first.data_ptr(),
                torch.cuda.current_stream(r.device).cuda_stream if r.is_cuda else None,
            )  # fmt: skip
            given = [tensors.pop(name) for name in getattr(self, direction)]
            assert not tensors
            function = getattr(self.library, f"{self.name}_{direction}")
            code = function(ctypes.byref(layout), *(None if x is None else x.data_ptr() for x in given))
        if code != 0:
            said = self.library.kernels_error(code).decode()
            raise RuntimeError(f"WKV-{self.name.removeprefix('wkv')} kernels: {said} (CUDA error {code})")


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and on a 16-byte boundary: the kernels load quads. A copy is made of odd views only."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def new_states(r: Tensor, n: int) -> Tensor:
    """Place for n states of the heads of rows r, fp32."""
    _, n_heads, head_size = r.shape
    return r.new_empty(n, n_heads, head_size, head_size, dtype=torch.float32)


# The layers of a model share their batch's table; a few more are kept for forests, where every level has its own.
@lru_cache(maxsize=64)
def _segments(cu_seqlens: bytes, device: torch.device, segment: int) -> Segments:
    bounds = torch.frombuffer(bytearray(cu_seqlens), dtype=torch.int32).long()
    lengths = bounds.diff()
    counts = (lengths + segment - 1) // segment
    first = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    number = torch.arange(int(first[-1])) - first[:-1].repeat_interleave(counts)
    rows = bounds[:-1].repeat_interleave(counts) + number * segment
    ends = bounds[1:].repeat_interleave(counts)
    table = torch.stack([rows, (ends - rows).clamp(max=segment)], dim=1)
    # Together, and without waiting: a blocking copy would wait for all that the device has been given to do.
    both = torch.cat([table.flatten(), first]).int().to(device, non_blocking=True)
    return Segments(both[: table.numel()].view(-1, 2), both[table.numel() :])
