"""What a block does between its matrix products: norms, token mixes, gates. Each function is one pass forwards and one backwards.

Rows are tokens of a forest, S of them in C channels; parameters are fp32 (float64 beside float64 rows) or are used as if they were.
An implementation has these functions:

    mixes(rows, x, handed_in, weight, bias, mixing, eps, of_before) -> (mixed, last)
        x [S, C] is normed: n = layer_norm(x) * weight + bias, rounded to the dtype of x; b is the n of the row before, handed_in
        [n_roots, C] (zero for None) before a root's first.
        mixed[m] = b + (n - b) * mixing[m], [M, S, C] for M vectors `mixing` of C numbers, or where they are of_before
        n + (b - n) * mixing[m]; last [n_segments, C]: n of the segments' last rows, or what their root was handed.
    gated_norm(y, gate, weight, bias, eps) -> [S, C]
        layer_norm over each head of y [S, H, N], times weight, plus bias, times silu(gate [S, C])
    relu_squared(x) -> max(x, 0) ** 2
    sigmoid_gate(gate, value) -> sigmoid(gate) * value

that of RWKV-6:

    token_mixes(own, before, adds, mixing) -> mixed
        own, before [S, C], adds [M, S, C]: mixed[m] = own + (before - own) * (mixing[m] + adds[m]), for M vectors `mixing` of C numbers

those of RWKV-7, whose parameters have C numbers and whose rows are [S, C] = [S, H, N]:

    delta_keys(k, a, a0, k_k, k_a, n_heads) -> (key, taken, put_back)
        rate = sigmoid(a0 + a); u = k * k_k, each head of it divided by its length, or 1e-12 where that is less;
        key = k * (1 + (rate - 1) * k_a), taken = -u, put_back = u * rate
    bonus_norm(y, gate, r, k, v, r_k, weight, bias, eps) -> [S, C]
        y, r, k, v [S, H, N]: (layer_norm over each head of y, times weight, plus bias, plus (the head's sum of r * k * r_k) * v) * gate
    blend(own, first, depth, v0) -> own + (first - own) * sigmoid(v0 + depth)
    log_decay(x, w0) -> -exp(-1/2) * sigmoid(w0 + x), fp32 (float64 of float64)

and for each one NAME_gradients(..., output gradients) -> a gradient for every input tensor, in their order. An output's gradient may be
None where `mixes` or `token_mixes` has it; handed_in's is None when handed_in is. mixes_gradients also takes g_past [S, C] or None, what x
has as its gradient by the way past the half, and adds it. log_decay_gradients(log_w, g_out, dtype) takes the result in place of the inputs,
and x's dtype.

`plain` is the definition, in torch's operations for any device and dtype; `cpu` and `cuda` are compiled.
"""

import logging
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_dpo.kernels.fused import cpu, cuda, plain

log = logging.getLogger(__name__)


class Rows(NamedTuple):
    """How a forest's rows follow one another, on their device. Numbers from S on are roots, in `before`, or segments, in `uses`."""

    before: Tensor  # int32 [S], the row before each; S + i: what root i was handed
    uses_start: Tensor  # int32 [S + n_roots + 1], into uses
    uses: Tensor  # int32 [S + n_segments], by row: the rows that it is before; S + i: segment i ends with it
    last_rows: Tensor  # int64 [n_segments], the row that each segment ends with; S + i: what root i was handed
    n_roots: int


def implementation(x: Tensor) -> Any:
    """The fastest that runs on rows x [S, C]: compiled for their device, else `plain`."""
    if x.is_cuda and not cuda.takes(x):
        return plain
    return _of_device(x.device)


def unusable_because(device: torch.device) -> str | None:
    """Why nothing compiled runs there, in one line. Compiles on first use."""
    return cuda.unusable_because(device) if device.type == "cuda" else cpu.unusable_because(device)


@cache
def _of_device(device: torch.device) -> Any:
    reason = unusable_because(device)
    if reason is None:
        return (cuda if device.type == "cuda" else cpu).functions()
    log.warning("the functions between matrix products are torch's own, and a step will take longer: %s", reason)
    return plain
