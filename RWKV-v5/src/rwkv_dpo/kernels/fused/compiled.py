"""The functions of a block by a compiled library, whatever it runs on: csrc/ has one for CPUs and one for NVIDIA GPUs, of the same C
functions."""

import ctypes
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwkv_dpo.kernels.build import EntryPoint

if TYPE_CHECKING:
    from rwkv_dpo.kernels.fused import Rows

# The types the kernels offer, by the code they know them under.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

_int, _long, _double, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class Where(ctypes.Structure):
    """What a call runs on, at the head of each structure below: they are mirrored field by field in csrc/."""

    _fields_ = (("stream", _pointer), ("n_threads", _int), ("dtype", _int))


class RowsCall(ctypes.Structure):
    """Of `mixes`. strip: rows whose share in a parameter's gradient is summed by itself."""

    _fields_ = (
        ("where", Where),
        *((name, _int) for name in ("n_rows", "n_channels", "n_roots", "n_segments", "n_mixes", "strip", "of_before")),
        ("eps", _double),
        *((name, _pointer) for name in ("before", "uses_start", "uses", "last_rows")),
    )


class HeadsCall(ctypes.Structure):
    """Of functions that look at each head, and of others with parameters."""

    _fields_ = (("where", Where), *((name, _int) for name in ("n_rows", "n_heads", "head_size", "strip")), ("eps", _double))


class FlatCall(ctypes.Structure):
    """Of functions for which numbers are numbers, wherever they stand in a tensor."""

    _fields_ = (("where", Where), ("n", _long))


def _takes(structure: type[ctypes.Structure], n_tensors: int) -> EntryPoint:
    return EntryPoint(ctypes.c_int, (ctypes.POINTER(structure), *n_tensors * [_pointer]))


ENTRY_POINTS = {
    "mixes_forward": _takes(RowsCall, 7), "mixes_backward": _takes(RowsCall, 12),
    "gated_norm_forward": _takes(HeadsCall, 5), "gated_norm_backward": _takes(HeadsCall, 9),
    "relu_squared_forward": _takes(FlatCall, 2), "relu_squared_backward": _takes(FlatCall, 3),
    "sigmoid_gate_forward": _takes(FlatCall, 3), "sigmoid_gate_backward": _takes(FlatCall, 5),
    "token_mixes_forward": _takes(RowsCall, 5), "token_mixes_backward": _takes(RowsCall, 10),
    "delta_keys_forward": _takes(HeadsCall, 8), "delta_keys_backward": _takes(HeadsCall, 12),
    "bonus_norm_forward": _takes(HeadsCall, 9), "bonus_norm_backward": _takes(HeadsCall, 16),
    "blend_forward": _takes(HeadsCall, 5), "blend_backward": _takes(HeadsCall, 10),
    "log_decay_forward": _takes(HeadsCall, 3), "log_decay_backward": _takes(HeadsCall, 5),
    "kernels_error": EntryPoint(ctypes.c_char_p, (ctypes.c_int,)),
}  # fmt: skip


class CommonFunctions:
    """Those of rwkv_dpo.kernels.fused that more than one version has, by name, by one library."""

    def __init__(self, library: ctypes.CDLL, strip: int) -> None:
        """strip: rows whose share in a parameter's gradient is summed by itself. It decides in which order sums are made, and nothing
        else does: not the number of threads, nor the device."""
        self.library, self._strip = library, strip
        self._functions = {name: getattr(library, name) for name in ENTRY_POINTS}

    def mixes(
        self, rows: "Rows", x: Tensor, handed_in: Tensor | None, weight: Tensor, bias: Tensor, mixing: Sequence[Tensor], eps: float,
        of_before: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See rwkv_dpo.kernels.fused."""
        mixed, last = x.new_empty(len(mixing), *x.shape), x.new_empty(rows.last_rows.numel(), x.shape[1])
        x, handed_in, weight, bias, mixing = _fit(rows, x, handed_in, weight, bias, mixing)
        self._run("mixes_forward", self._rows(rows, x, mixing, eps, of_before), x, handed_in, weight, bias, pointers(mixing), mixed, last)
        return mixed, last

    def mixes_gradients(
        self, rows: "Rows", x: Tensor, handed_in: Tensor | None, weight: Tensor, bias: Tensor, mixing: Sequence[Tensor], eps: float,
        g_mixed: Sequence[Tensor | None], g_last: Tensor | None, g_past: Tensor | None, of_before: bool = False,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """See rwkv_dpo.kernels.fused: of x, handed_in, weight, bias, and of each of mixing."""
        shapes = [mix.shape for mix in mixing]
        x, handed_in, weight, bias, mixing = _fit(rows, x, handed_in, weight, bias, mixing)
        g_x, g_handed_in = torch.empty_like(x), None if handed_in is None else torch.empty_like(handed_in)
        g_parameters, partial = self._sums(weight, len(x), (2 + len(mixing)) * x.shape[1])
        g_mixed, g_last, g_past = [dense(g) for g in g_mixed], dense(g_last), dense(g_past)
        self._run(
            "mixes_backward", self._rows(rows, x, mixing, eps, of_before), x, handed_in, weight, bias, pointers(mixing),
            pointers(g_mixed), g_last, g_past, g_x, g_handed_in, partial, g_parameters,
        )
        g_weight, g_bias, *g_mixing = g_parameters.view(-1, x.shape[1]).unbind()
        return g_x, g_handed_in, g_weight, g_bias, *(g.view(shape) for g, shape in zip(g_mixing, shapes, strict=True))

    def gated_norm(self, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """See rwkv_dpo.kernels.fused."""
        y, gate, weight, bias = y.contiguous(), gate.contiguous(), parameter(weight, y), parameter(bias, y)
        out = torch.empty_like(gate)
        self._run("gated_norm_forward", self._heads(y, eps), y, gate, weight, bias, out)
        return out

    def gated_norm_gradients(self, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, g_out: Tensor) -> tuple[Tensor, ...]:
        """See rwkv_dpo.kernels.fused: of y, gate, weight and bias."""
        y, gate, weight, bias, g_out = y.contiguous(), gate.contiguous(), parameter(weight, y), parameter(bias, y), g_out.contiguous()
        g_y, g_gate = torch.empty_like(y), torch.empty_like(gate)
        g_parameters, partial = self._sums(weight, len(y), 2 * gate.shape[1])
        self._run("gated_norm_backward", self._heads(y, eps), y, gate, weight, bias, g_out, g_y, g_gate, partial, g_parameters)
        return g_y, g_gate, *g_parameters.view(2, -1).unbind()

    def relu_squared(self, x: Tensor) -> Tensor:
        """See rwkv_dpo.kernels.fused."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self._run("relu_squared_forward", self._flat(x), x, out)
        return out

    def relu_squared_gradients(self, x: Tensor, g_out: Tensor) -> tuple[Tensor, ...]:
        """See rwkv_dpo.kernels.fused."""
        x, g_out = x.contiguous(), g_out.contiguous()
        g_x = torch.empty_like(x)
        self._run("relu_squared_backward", self._flat(x), x, g_out, g_x)
        return (g_x,)

    def sigmoid_gate(self, gate: Tensor, value: Tensor) -> Tensor:
        """See rwkv_dpo.kernels.fused."""
        gate, value = gate.contiguous(), value.contiguous()
        out = torch.empty_like(value)
        self._run("sigmoid_gate_forward", self._flat(gate), gate, value, out)
        return out

    def sigmoid_gate_gradients(self, gate: Tensor, value: Tensor, g_out: Tensor) -> tuple[Tensor, ...]:
        """See rwkv_dpo.kernels.fused."""
        gate, value, g_out = gate.contiguous(), value.contiguous(), g_out.contiguous()
        g_gate, g_value = torch.empty_like(gate), torch.empty_like(value)
        self._run("sigmoid_gate_backward", self._flat(gate), gate, value, g_out, g_gate, g_value)
        return g_gate, g_value

    def _rows(self, rows: "Rows", x: Tensor, mixing: Sequence[Tensor], eps: float, of_before: bool) -> RowsCall:
        indices = (index.data_ptr() for index in rows[:4])
        return RowsCall(where(x), *x.shape, rows.n_roots, rows.last_rows.numel(), len(mixing), self._strip, of_before, eps, *indices)

    def _heads(self, y: Tensor, eps: float) -> HeadsCall:
        return HeadsCall(where(y), *y.shape, self._strip, eps)

    def _flat(self, x: Tensor) -> FlatCall:
        return FlatCall(where(x), x.numel())

    def _sums(self, like: Tensor, n_rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Gradients of parameters side by side, and what each strip of rows adds to them."""
        return like.new_empty(width), like.new_empty(-(-n_rows // self._strip), width)

    def _run(self, function: str, call: ctypes.Structure, *arguments: Tensor | ctypes.Array | None) -> None:
        handed = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
        if code := self._functions[function](call, *handed):
            raise RuntimeError(f"{function}: {self.library.kernels_error(code).decode()} (CUDA error {code})")


def where(x: Tensor) -> Where:
    """Where a call on x runs, and its type."""
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    return Where(stream, torch.get_num_threads(), DTYPES[x.dtype])


def _fit(
    rows: "Rows", x: Tensor, handed_in: Tensor | None, weight: Tensor, bias: Tensor, mixing: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, list[Tensor]]:
    """The inputs of `mixes` as the library takes them. ValueError where sizes don't fit: raw pointers follow."""
    n_rows, n_channels = x.shape
    if rows.before.numel() != n_rows or rows.uses_start.numel() != n_rows + rows.n_roots + 1:
        raise ValueError(f"{n_rows} rows beside links of {rows.before.numel()}")
    if any(p.numel() != n_channels for p in (weight, bias, *mixing)):
        raise ValueError(f"a parameter of mixes hasn't {n_channels} numbers")
    if handed_in is not None and (handed_in.shape != (rows.n_roots, n_channels) or handed_in.dtype != x.dtype):
        raise ValueError(f"handed_in is {handed_in.dtype} {tuple(handed_in.shape)}, beside {rows.n_roots} roots and x {tuple(x.shape)}")
    weight, bias, *mixing = (parameter(p, x) for p in (weight, bias, *mixing))
    return x.contiguous(), dense(handed_in), weight, bias, mixing


def dense(x: Tensor | None) -> Tensor | None:
    """As the library takes it."""
    return None if x is None else x.contiguous()


def parameter(p: Tensor, x: Tensor) -> Tensor:
    """In the type that the arithmetic on x has."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return p if p.dtype == dtype and p.is_contiguous() else p.to(dtype).contiguous()


def pointers(tensors: Iterable[Tensor | None]) -> ctypes.Array:
    """An array of them; the caller keeps the tensors alive meanwhile."""
    found = [None if x is None else x.data_ptr() for x in tensors]
    return (_pointer * len(found))(*found)
