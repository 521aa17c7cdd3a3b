"""The functions of a block in torch's operations: what the compiled ones have to equal, on any device and in any dtype."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from rwkv_dpo.kernels.fused import Rows

# What a head of RWKV-7's keys is divided by at least, and its fastest decay: log w lies between this and 0.
LEAST_LENGTH, LEAST_LOG_W = 1e-12, -math.exp(-0.5)


def unusable_because(device: torch.device) -> str | None:
    """Never."""
    return None


def mixes(
    rows: "Rows", x: Tensor, handed_in: Tensor | None, weight: Tensor, bias: Tensor, mixing: Sequence[Tensor], eps: float,
    of_before: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See rwkv_dpo.kernels.fused."""
    normed = F.layer_norm(x, x.shape[1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    before_roots = x.new_zeros(rows.n_roots, x.shape[1]) if handed_in is None else handed_in
    tokens = torch.cat([normed, before_roots])
    before = tokens.index_select(0, rows.before)
    start, end = (normed, before) if of_before else (before, normed)
    mixed = torch.stack([torch.lerp(start, end, mix.view(-1).to(x.dtype)) for mix in mixing])
    return mixed, tokens.index_select(0, rows.last_rows)


def mixes_gradients(
    rows: "Rows", x: Tensor, handed_in: Tensor | None, weight: Tensor, bias: Tensor, mixing: Sequence[Tensor], eps: float,
    g_mixed: Sequence[Tensor | None], g_last: Tensor | None, g_past: Tensor | None, of_before: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """See rwkv_dpo.kernels.fused: of x, handed_in, weight, bias, and of each of mixing."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> list[Tensor]:
        given = None if handed_in is None else others[0]
        mixed, last = mixes(rows, x, given, weight, bias, others[0 if handed_in is None else 1 :], eps, of_before)
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


def token_mixes(own: Tensor, before: Tensor, adds: Tensor, mixing: Sequence[Tensor]) -> Tensor:
    """See rwkv_dpo.kernels.fused."""
    shares = adds + torch.stack([mix.view(1, -1).to(own.dtype) for mix in mixing])
    return torch.lerp(own, before, shares)


def token_mixes_gradients(
    own: Tensor, before: Tensor, adds: Tensor, mixing: Sequence[Tensor], g_mixed: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """See rwkv_dpo.kernels.fused: of own, before, adds, and of each of mixing."""

    def run(own: Tensor, before: Tensor, adds: Tensor, *mixing: Tensor) -> list[Tensor]:
        return [*token_mixes(own, before, adds, mixing)]

    return _gradients(run, (own, before, adds, *mixing), g_mixed)


def delta_keys(k: Tensor, a: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """See rwkv_dpo.kernels.fused."""
    a0, k_k, k_a = (p.view(-1).to(k.dtype) for p in (a0, k_k, k_a))
    rate = torch.sigmoid(a0 + a)
    unit = F.normalize((k * k_k).view(len(k), n_heads, k.shape[1] // n_heads), dim=-1, eps=LEAST_LENGTH).view_as(k)
    return k * (1 + (rate - 1) * k_a), -unit, unit * rate


def delta_keys_gradients(
    k: Tensor, a: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, n_heads: int, g_key: Tensor, g_taken: Tensor, g_put_back: Tensor
) -> tuple[Tensor | None, ...]:
    """See rwkv_dpo.kernels.fused: of k, a, a0, k_k and k_a."""

    def run(k: Tensor, a: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor) -> list[Tensor]:
        return [*delta_keys(k, a, a0, k_k, k_a, n_heads)]

    return _gradients(run, (k, a, a0, k_k, k_a), (g_key, g_taken, g_put_back))


def bonus_norm(
    y: Tensor, gate: Tensor, r: Tensor, k: Tensor, v: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """See rwkv_dpo.kernels.fused."""
    bonus = (r * k * r_k.view(r.shape[1:]).to(r.dtype)).sum(-1, keepdim=True) * v
    normed = F.layer_norm(y, y.shape[-1:], eps=eps).flatten(1)
    return (torch.addcmul(bias.to(y.dtype), normed, weight.to(y.dtype)) + bonus.flatten(1)) * gate


def bonus_norm_gradients(
    y: Tensor, gate: Tensor, r: Tensor, k: Tensor, v: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor, eps: float, g_out: Tensor
) -> tuple[Tensor | None, ...]:
    """See rwkv_dpo.kernels.fused: of y, gate, r, k, v, r_k, weight and bias."""

    def run(*inputs: Tensor) -> list[Tensor]:
        y, gate, r, k, v, r_k, weight, bias = inputs
        return [bonus_norm(y, gate, r, k, v, r_k, weight, bias, eps)]

    return _gradients(run, (y, gate, r, k, v, r_k, weight, bias), (g_out,))


def blend(own: Tensor, first: Tensor, depth: Tensor, v0: Tensor) -> Tensor:
    """See rwkv_dpo.kernels.fused."""
    return torch.lerp(own, first, torch.sigmoid(v0.view(-1).to(own.dtype) + depth))


def blend_gradients(own: Tensor, first: Tensor, depth: Tensor, v0: Tensor, g_out: Tensor) -> tuple[Tensor | None, ...]:
    """See rwkv_dpo.kernels.fused: of own, first, depth and v0."""
    return _gradients(lambda *inputs: [blend(*inputs)], (own, first, depth, v0), (g_out,))


def log_decay(x: Tensor, w0: Tensor) -> Tensor:
    """See rwkv_dpo.kernels.fused."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.sigmoid(x.to(wide) + w0.view(-1).to(wide)) * LEAST_LOG_W


def log_decay_gradients(log_w: Tensor, g_out: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See rwkv_dpo.kernels.fused: of x and w0."""
    g_x = g_out * log_w * (1 - log_w / LEAST_LOG_W)
    return g_x.to(dtype), g_x.sum(0)


def _gradients(
    run: Callable[..., list[Tensor]], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        given = [(output, grad) for output, grad in zip(run(*leaves), grads, strict=True) if grad is not None]
    return torch.autograd.grad([output for output, _ in given], leaves, [grad for _, grad in given], materialize_grads=True)
