"""WKV-5 as matrix products over chunks of tokens, in plain PyTorch: for any device, and for float64.

A chunk starts from state S and reads, for its tokens b = 0 .. L-1 (L tokens, w the decay):

    y_b = (w^b r_b) S + sum_{a<b} <r_b w^(b-1-a), k_a> v_a + <r_b u, k_b> v_b          S' = w^L S + sum_a (w^(L-1-a) k_a) v_a

The pair sum is cut in halves again and again: for b in the second and a in the first half of a block, with the second half starting
at m, w^(b-1-a) = w^(b-m) w^(m-1-a), and one matrix product serves the whole quarter of the triangle. Only powers w^0 .. w^L
occur, never a quotient of decays, so nothing overflows, however fast or slow the decay.

With G = dL/dS the backward has the same form, G running from the last chunk to the first.
"""

import torch
from torch.autograd.function import once_differentiable

from rwkv_dpo.kernels.chunks import first_states, from_chunks, halves, in_order, lay_out, lower_left, scan_decayed, small_product, to_chunks
from rwkv_dpo.kernels.loop import wide
from rwkv_dpo.kernels.wkv5.reference import decay_rate

# A power of two. Larger chunks mean fewer states, and more pairs inside the chunks.
CHUNK = 32


def unusable_because(device: torch.device) -> str | None:
    """None: it runs on any device."""
    return None


def wkv5(r, k, v, time_decay, u, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv5 for shapes. Computes in float64 for float64 inputs, in fp32 otherwise."""
    return _Wkv5.apply(r, k, v, time_decay, u, cu_seqlens, state0)


class _Wkv5(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, time_decay, u, cu_seqlens, state0):
        dtype = wide(r.dtype)
        layout = lay_out(cu_seqlens, CHUNK, r.device)
        with torch.autocast(r.device.type, enabled=False):
            log_w = -decay_rate(time_decay.to(dtype))
            powers = torch.exp(log_w[:, None, :] * torch.arange(CHUNK + 1, device=r.device)[:, None])  # [H, CHUNK + 1, N]
            r_chunks, k_chunks, v_chunks = (to_chunks(x, layout, dtype) for x in (r, k, v))
            state = first_states(state0, layout, r_chunks)
            y, scores, starts = _forward(r_chunks, k_chunks, v_chunks, powers, u.to(dtype), state, layout)
            state_end = in_order(state, layout)
        ctx.layout = layout
        ctx.save_for_backward(r_chunks, k_chunks, v_chunks, powers, log_w, time_decay, u, scores, starts)
        return from_chunks(y, layout, r), state_end

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_state_end):
        r, k, v, powers, log_w, time_decay, u, scores, starts = ctx.saved_tensors
        layout = ctx.layout
        with torch.autocast(gy.device.type, enabled=False):
            gy_chunks = to_chunks(gy, layout, powers.dtype)
            gr, gk, gv, g_log_w, gu, g_state = _backward(
                r, k, v, powers, u.to(powers.dtype), scores, starts, gy_chunks, g_state_end[layout.order], layout
            )
            g_state0 = in_order(g_state, layout) if ctx.needs_input_grad[6] else None
        g_tokens = (from_chunks(g, layout, gy) for g in (gr, gk, gv))
        # log w = -exp(time_decay) is its own derivative.
        return *g_tokens, (g_log_w * log_w).to(time_decay.dtype), gu.to(u.dtype), None, g_state0


def _forward(r, k, v, powers, u, state, layout):
    """Chunks r, k, v [C, H, L, N] and states [n, H, N, N] -> y, pair scores and each chunk's first state; the states become those at the
    end."""
    from_start, to_end, over_chunk = _decays(powers, layout)
    written = (k * to_end).transpose(-1, -2) @ v
    starts = scan_decayed(written, over_chunk, state, layout)
    scores = _pair_scores(r, k, powers, u)
    y = scores @ v + (r * from_start) @ starts
    return y, scores, starts


def _backward(r, k, v, powers, u, scores, starts, gy, g_state, layout):
    """Gradients of r, k, v (chunks), log w, u and the states at the start."""
    from_start, to_end, over_chunk = _decays(powers, layout)
    read = (r * from_start).transpose(-1, -2) @ gy
    g_ends = scan_decayed(read, over_chunk, g_state, layout, backwards=True)
    gv = scores.transpose(-1, -2) @ gy + (k * to_end) @ g_ends
    gr = (gy @ starts.transpose(-1, -2)) * from_start
    gk = (v @ g_ends.transpose(-1, -2)) * to_end
    # d w^e / d log w = e w^e: each way a token takes counts with the number of steps it spends in the state.
    position = torch.arange(CHUNK, device=r.device, dtype=r.dtype)[:, None]
    lengths = layout.lengths[:, None, None].to(r.dtype)
    left = (lengths[..., None] - 1 - position).clamp(min=0)
    g_log_w = ((r * gr).sum(0) * position).sum(1) + (k * gk * left).sum(0).sum(1)
    g_log_w += (lengths * over_chunk[..., 0] * (starts * g_ends).sum(-1)).sum(0)
    g_scores = gy @ v.transpose(-1, -2)
    gu = _add_pair_gradients(g_scores, r, k, powers, u, gr, gk, g_log_w)
    return gr, gk, gv, g_log_w, gu, g_state


def _decays(powers, layout):
    """w^b from a chunk's start to its token b [1, H, L, N]; w^(l-1-a) from after token a to its end [C or 1, H, L, N], l tokens
    from its start; and w^l over the whole chunk [C, H, N, 1]."""
    position = torch.arange(CHUNK, device=powers.device)
    left = (layout.lengths[:, None] - 1 - position).clamp(min=0)
    to_end = powers[:, left].transpose(0, 1)
    over_chunk = powers[:, layout.lengths].transpose(0, 1)[..., None].expand(layout.n_chunks, -1, -1, -1)
    return powers[None, :, :CHUNK], to_end, over_chunk


def _levels():
    half = CHUNK // 2
    while half:
        yield half
        half //= 2


def _pair_scores(r, k, powers, u):
    """score[b, a] = <r_b w^(b-1-a), k_a> for a < b, <r_b u, k_b> on the diagonal, 0 above: [C, H, L, L]."""
    scores = r.new_zeros(*r.shape[:3], CHUNK)
    for half in _levels():
        later, earlier, _, _ = _faded_halves(r, k, powers, half)
        lower_left(scores, half).copy_(later @ earlier.transpose(-1, -2))
    scores.diagonal(dim1=-2, dim2=-1).copy_(((r * k) @ u[:, :, None]).squeeze(-1))
    return scores


def _add_pair_gradients(g_scores, r, k, powers, u, gr, gk, g_log_w):
    """Adds what _pair_scores owes to gr, gk and g_log_w, in place; returns the gradient of u."""
    for half in _levels():
        later, earlier, rising, falling = _faded_halves(r, k, powers, half)
        g = lower_left(g_scores, half)
        g_later, g_earlier = small_product(g, earlier), small_product(g.transpose(-1, -2), later)
        halves(gr, half)[1].addcmul_(g_later, rising)
        halves(gk, half)[0].addcmul_(g_earlier, falling)
        steps = torch.arange(half, device=r.device, dtype=r.dtype)[:, None]
        # Over chunks first: a sum over several axes at once is twice as slow.
        g_log_w += (later.mul_(g_later).sum(0) * steps + earlier.mul_(g_earlier).sum(0) * steps.flip(0)).sum((1, 2))
    g_diagonal = g_scores.diagonal(dim1=-2, dim2=-1)[..., None]
    gr += g_diagonal * k * u[:, None]
    gk += g_diagonal * r * u[:, None]
    return (g_diagonal * r * k).sum(0).sum(1)


def _faded_halves(r, k, powers, half):
    """r_b w^(b-m) of the second halves, k_a w^(m-1-a) of the first halves, and the two tables of decays."""
    rising = powers[:, None, :half]
    falling = rising.flip(2)
    return halves(r, half)[1] * rising, halves(k, half)[0] * falling, rising, falling
