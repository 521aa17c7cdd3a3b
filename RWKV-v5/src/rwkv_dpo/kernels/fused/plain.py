"""The functions of a block in torch's operations: what the compiled ones have to equal, on any device and in any dtype."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from rwkv_dpo.kernels.fused import Rows


def unusable_because(device: torch.device) -> str | None:
    """Never."""
    return None


def mixes(
    rows: "Rows", x: Tensor, handed_in: Tensor | None, weight: Tensor, bias: Tensor, mixing: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """See rwkv_dpo.kernels.fused."""
    normed = F.layer_norm(x, x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    before_roots = x.new_zeros(rows.n_roots, x.shape[1]) if handed_in is None else handed_in
    tokens = torch.cat([normed, before_roots])
    before = tokens.index_select(0, rows.before)
    mixed = torch.stack([torch.lerp(before, normed, mix.view(-1).to(x.dtype)) for mix in mixing])
    return mixed, tokens.index_select(0, rows.last_rows)


def mixes_gradients(
    rows: "Rows", x: Tensor, handed_in: Tensor | None, weight: Tensor, bias: Tensor, mixing: Sequence[Tensor], eps: float,
    g_mixed: Sequence[Tensor | None], g_last: Tensor | None, g_past: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See rwkv_dpo.kernels.fused: of x, handed_in, weight, bias, and of each of mixing."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> list[Tensor]:
        given = None if handed_in is None else others[0]
        mixed, last = mixes(rows, x, given, weight, bias, others[0 if handed_in is None else 1 :], eps)
        return [*mixed, last]

    handed = () if handed_in is None else (handed_in,)
    g_x, g_weight, g_bias, *others = _gradients(run, (x, weight, bias, *handed, *mixing), (*g_mixed, g_last))
    assert g_x is not None
    g_x = g_x if g_past is None else g_x + g_past
    return (g_x, None, g_weight, g_bias, *others) if handed_in is None else (g_x, others[0], g_weight, g_bias, *others[1:])


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See rwkv_dpo.kernels.fused."""
    normed = F.layer_norm(y, y.shape[-1:], eps=eps).flatten(1)
    return torch.addcmul(bias.to(y.dtype), normed, weight.to(y.dtype)) * F.silu(gate)


def gated_norm_gradients(
    y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float, g_out: Tensor
) -> tuple[Tensor | None, ...]:
    """See rwkv_dpo.kernels.fused: of y, gate, weight and bias."""
    return _gradients(lambda y, gate, weight, bias: [gated_norm(y, gate, weight, bias, eps)], (y, gate, weight, bias), (g_out,))


def relu_squared(x: Tensor) -> Tensor:
    """See rwkv_dpo.kernels.fused."""
    return F.relu(x).square()


def relu_squared_gradients(x: Tensor, g_out: Tensor) -> tuple[Tensor | None, ...]:
    """See rwkv_dpo.kernels.fused."""
    return (F.relu(x).mul_(2).mul_(g_out),)


def sigmoid_gate(gate: Tensor, value: Tensor) -> Tensor:
    """See rwkv_dpo.kernels.fused."""
    return torch.sigmoid(gate) * value


def sigmoid_gate_gradients(gate: Tensor, value: Tensor, g_out: Tensor) -> tuple[Tensor | None, ...]:
    """See rwkv_dpo.kernels.fused."""
    opened = torch.sigmoid(gate)
    return g_out * value * opened * (1 - opened), g_out * opened


def _gradients(
    run: Callable[..., list[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        given = [(output, grad) for output, grad in zip(run(*leaves), grads, strict=True) if grad is not None]
    return torch.autograd.grad([output for output, _ in given], leaves, [grad for _, grad in given], materialize_grads=True)
