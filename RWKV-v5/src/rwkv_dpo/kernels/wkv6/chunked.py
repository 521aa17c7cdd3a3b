"""WKV-6 as matrix products over chunks of tokens, in plain PyTorch: for any device, and for float64.

A chunk starts from state S and reads, for its tokens b = 0 .. L-1, with w(a, b) the product of the decays of tokens a .. b-1:

    y_b = (w(0, b) r_b) S + sum_{a<b} <r_b w(a+1, b), k_a> v_a + <r_b u, k_b> v_b         S' = w(0, L) S + sum_a (w(a+1, L) k_a) v_a

The pair sum is cut in halves again and again: for b in the second and a in the first half of a block, with the second half starting
at m, w(a+1, b) = w(m, b) w(a+1, m), and one matrix product serves the whole quarter of the triangle. Logarithms of decays are summed
outward from m and never subtracted, so that nothing overflows and nothing cancels, however fast or slow the decay.

With G = dL/dS the backward has the same form, G running from the last chunk to the first.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_dpo.kernels.chunks import first_states, from_chunks, halves, in_order, lay_out, lower_left, scan_decayed, small_product, to_chunks
from rwkv_dpo.kernels.loop import wide

# A power of two. Larger chunks mean fewer states, and more pairs inside the chunks.
CHUNK = 32

# exp of it is 0 in float64 too; sums of a chunk of them stay finite, where minus infinity times 0 is NaN.
LEAST_LOG_W = -1e4


def unusable_because(device: torch.device) -> str | None:
    """None: it runs on any device."""
    return None


def wkv6(r, k, v, log_w, u, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv6 for shapes. Computes in float64 for float64 inputs, in fp32 otherwise."""
    return _Wkv6.apply(r, k, v, log_w, u, cu_seqlens, state0)


class _Wkv6(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, log_w, u, cu_seqlens, state0):
        dtype = wide(r.dtype)
        layout = lay_out(cu_seqlens, CHUNK, r.device)
        with torch.autocast(r.device.type, enabled=False):
            r_chunks, k_chunks, v_chunks, decays = (to_chunks(x, layout, dtype) for x in (r, k, v, log_w))
            decays.clamp_(min=LEAST_LOG_W)
            state = first_states(state0, layout, r_chunks)
            y, scores, starts = _forward(r_chunks, k_chunks, v_chunks, decays, u.to(dtype), state, layout)
            state_end = in_order(state, layout)
        ctx.layout, ctx.type_of_log_w = layout, log_w.dtype
        ctx.save_for_backward(r_chunks, k_chunks, v_chunks, decays, u, scores, starts)
        return from_chunks(y, layout, r), state_end

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_state_end):
        r, k, v, log_w, u, scores, starts = ctx.saved_tensors
        layout = ctx.layout
        with torch.autocast(gy.device.type, enabled=False):
            gy_chunks, g_state = to_chunks(gy, layout, r.dtype), g_state_end[layout.order]
            gr, gk, gv, g_log_w, gu = _backward(r, k, v, log_w, u.to(r.dtype), scores, starts, gy_chunks, g_state, layout)
            g_state0 = in_order(g_state, layout) if ctx.needs_input_grad[6] else None
        rows = (from_chunks(g, layout, gy) for g in (gr, gk, gv))
        return *rows, from_chunks(g_log_w, layout, gy.new_empty(0, *gy.shape[1:], dtype=ctx.type_of_log_w)), gu.to(u.dtype), None, g_state0


class _Sums(NamedTuple):
    """Logs of decays summed over parts of blocks of tokens, [C, H, L, N] each, but [C, H, blocks, N] for `whole`."""

    before: Tensor  # from the block's start to before this token
    after: Tensor  # from after this token to the block's end
    whole: Tensor  # over the block


def _forward(r, k, v, log_w, u, state, layout):
    """Chunks r, k, v, log w [C, H, L, N] and states [n, H, N, N] -> y, pair scores and each chunk's first state; the states become those
    at the end."""
    scores = r.new_zeros(*r.shape[:3], CHUNK)
    sums = _Sums(torch.zeros_like(log_w), torch.zeros_like(log_w), log_w)
    half = 1
    while half < CHUNK:
        later, earlier, _, _ = _faded_halves(r, k, sums, half)
        lower_left(scores, half).copy_(later @ earlier.transpose(-1, -2))
        sums = _doubled(sums, half)
        half *= 2
    scores.diagonal(dim1=-2, dim2=-1).copy_(((r * k) @ u[:, :, None]).squeeze(-1))
    written = (k * sums.after.exp()).transpose(-1, -2) @ v
    starts = scan_decayed(written, sums.whole.exp().transpose(-1, -2), state, layout)
    return scores @ v + (r * sums.before.exp()) @ starts, scores, starts


def _backward(r, k, v, log_w, u, scores, starts, gy, g_state, layout):
    """Gradients of r, k, v, log w (chunks) and u; g_state becomes that of the states at the start."""
    levels = {1: _Sums(torch.zeros_like(log_w), torch.zeros_like(log_w), log_w)}
    half = 1
    while half < CHUNK:
        levels[2 * half] = _doubled(levels[half], half)
        half *= 2
    from_start, to_end, over_chunk = (x.exp() for x in levels.pop(CHUNK))
    g_ends = scan_decayed((r * from_start).transpose(-1, -2) @ gy, over_chunk.transpose(-1, -2), g_state, layout, backwards=True)
    gv = scores.transpose(-1, -2) @ gy + (k * to_end) @ g_ends
    gr = (gy @ starts.transpose(-1, -2)).mul_(from_start)
    gk = (v @ g_ends.transpose(-1, -2)).mul_(to_end)
    g_sums = _Sums(r * gr, k * gk, over_chunk * (starts * g_ends).sum(-1)[:, :, None])
    g_scores = gy @ v.transpose(-1, -2)
    while levels:
        half, sums = levels.popitem()
        later, earlier, rising, falling = _faded_halves(r, k, sums, half)
        g = lower_left(g_scores, half)
        g_later, g_earlier = small_product(g, earlier), small_product(g.transpose(-1, -2), later)
        g_sums = _gradient_of_doubled(g_sums, half)
        halves(g_sums.before, half)[1].addcmul_(later, g_later)
        halves(g_sums.after, half)[0].addcmul_(earlier, g_earlier)
        halves(gr, half)[1].addcmul_(g_later, rising)
        halves(gk, half)[0].addcmul_(g_earlier, falling)
    g_diagonal = g_scores.diagonal(dim1=-2, dim2=-1)[..., None]
    gr += g_diagonal * k * u[:, None]
    gk += g_diagonal * r * u[:, None]
    return gr, gk, gv, g_sums.whole, (g_diagonal * r * k).sum(0).sum(1)


def _faded_halves(r, k, sums, half):
    """r_b w(m, b) of the second halves of blocks of 2 * half tokens, k_a w(a+1, m) of the first halves, and both decays."""
    rising, falling = halves(sums.before, half)[1].exp(), halves(sums.after, half)[0].exp()
    return halves(r, half)[1] * rising, halves(k, half)[0] * falling, rising, falling


def _doubled(sums, half):
    """Sums over blocks of 2 * half tokens, from those over blocks of `half`."""
    before, after = sums.before.clone(), sums.after.clone()
    first, second = sums.whole.unflatten(2, (-1, 2)).unbind(3)
    halves(before, half)[1].add_(first[:, :, :, None])
    halves(after, half)[0].add_(second[:, :, :, None])
    return _Sums(before, after, first + second)


def _gradient_of_doubled(g_sums, half):
    """The transpose of _doubled."""
    g_first = g_sums.whole + halves(g_sums.before, half)[1].sum(3)
    g_second = g_sums.whole + halves(g_sums.after, half)[0].sum(3)
    return _Sums(g_sums.before, g_sums.after, torch.stack([g_first, g_second], 3).flatten(2, 3))
