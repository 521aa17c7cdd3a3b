"""WKV-5 as matrix products over chunks of tokens, in plain PyTorch: for any device, and for float64.

A chunk starts from state S and reads, for its tokens b = 0 .. L-1 (L tokens, w the decay):

    y_b = (w^b r_b) S + sum_{a<b} <r_b w^(b-1-a), k_a> v_a + <r_b u, k_b> v_b          S' = w^L S + sum_a (w^(L-1-a) k_a) v_a

The pair sum is cut in halves again and again: for b in the second and a in the first half of a block, with the second half starting
at m, w^(b-1-a) = w^(b-m) w^(m-1-a), and one matrix product serves the whole quarter of the triangle. Only powers w^0 .. w^L
occur, never a quotient of decays, so nothing overflows, however fast or slow the decay.

With G = dL/dS the backward has the same form, G running from the last chunk to the first.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from rwkv_dpo.kernels.wkv5.common import bytes_of, decay_rate

# A power of two. Larger chunks mean fewer states, and more pairs inside the chunks.
CHUNK = 32


def unusable_because(device: torch.device) -> str | None:
    """None: it runs on any device."""
    return None


def wkv5(r, k, v, time_decay, u, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv5 for shapes. Computes in float64 for float64 inputs, in fp32 otherwise."""
    return _Wkv5.apply(r, k, v, time_decay, u, cu_seqlens, state0)


class _Layout(NamedTuple):
    """How sequences are cut into chunks. Chunks are ordered in steps: the first chunk of every sequence that has one, longest
    sequence first, then the second chunks, and so on. So each step works on a prefix of the sequences of the step before."""

    slot: torch.Tensor | None  # int64 [S]: where each token goes among n_chunks * CHUNK rows; None when it stays where it is
    lengths: torch.Tensor  # int64 [n_chunks], or [1] when all chunks are full
    steps: list[tuple[int, int]]  # chunks start:stop of each step
    order: torch.Tensor  # int64 [n]: sequences from the longest to the shortest
    n_chunks: int


# The layers of a model share their batch's layouts, one for each level of its forest; a few more are kept for batches in chunks.
@lru_cache(maxsize=64)
def _layout(cu_seqlens: bytes, device: torch.device) -> _Layout:
    """cu_seqlens: int32, as bytes_of has it."""
    bounds = torch.frombuffer(bytearray(cu_seqlens), dtype=torch.int32).long()
    lengths = bounds.diff()
    n_tokens = int(lengths.sum())
    sorted_lengths, order = lengths.sort(descending=True, stable=True)
    n_steps = int(-(-sorted_lengths[0] // CHUNK)) if len(order) else 0
    # left[i, s]: tokens of the s-th longest sequence that remain before step i.
    left = sorted_lengths - CHUNK * torch.arange(n_steps)[:, None]
    stops = (left > 0).sum(1).cumsum(0).tolist()
    chunk_lengths = left[left > 0].clamp(max=CHUNK)
    n_chunks = len(chunk_lengths)
    slot = None
    if n_tokens < n_chunks * CHUNK or len(lengths) > 1:
        chunk_of = torch.zeros(n_steps, len(order), dtype=torch.long)
        chunk_of[left > 0] = torch.arange(n_chunks)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        sequence = torch.repeat_interleave(torch.arange(len(order)), lengths)
        position = torch.arange(n_tokens) - bounds[:-1][sequence]
        slot = (chunk_of[position // CHUNK, rank[sequence]] * CHUNK + position % CHUNK).to(device, non_blocking=True)
    if n_tokens == n_chunks * CHUNK:
        chunk_lengths = torch.tensor([CHUNK])
    steps = list(zip([0, *stops], stops, strict=False))
    # Blocking copies would wait for all that the device has been given to do.
    return _Layout(slot, chunk_lengths.to(device, non_blocking=True), steps, order.to(device, non_blocking=True), n_chunks)


class _Wkv5(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, time_decay, u, cu_seqlens, state0):
        n_seqs, (_, n_heads, head_size) = cu_seqlens.numel() - 1, r.shape
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        layout = _layout(bytes_of(cu_seqlens), r.device)
        with torch.autocast(r.device.type, enabled=False):
            log_w = -decay_rate(time_decay.to(dtype))
            powers = torch.exp(log_w[:, None, :] * torch.arange(CHUNK + 1, device=r.device)[:, None])  # [H, CHUNK + 1, N]
            r_chunks, k_chunks, v_chunks = (_to_chunks(x, layout, dtype) for x in (r, k, v))
            shape = (n_seqs, n_heads, head_size, head_size)
            state = r.new_zeros(shape, dtype=dtype) if state0 is None else state0.to(dtype)[layout.order]
            y, state, scores, starts = _forward(r_chunks, k_chunks, v_chunks, powers, u.to(dtype), state, layout)
            state_end = torch.empty_like(state).index_copy_(0, layout.order, state)
        ctx.layout = layout
        ctx.save_for_backward(r_chunks, k_chunks, v_chunks, powers, log_w, time_decay, u, scores, starts)
        return _from_chunks(y, layout, r), state_end

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_state_end):
        r, k, v, powers, log_w, time_decay, u, scores, starts = ctx.saved_tensors
        layout = ctx.layout
        with torch.autocast(gy.device.type, enabled=False):
            gy_chunks = _to_chunks(gy, layout, powers.dtype)
            gr, gk, gv, g_log_w, gu, g_state = _backward(
                r, k, v, powers, u.to(powers.dtype), scores, starts, gy_chunks, g_state_end[layout.order], layout
            )
            g_state0 = torch.empty_like(g_state).index_copy_(0, layout.order, g_state) if ctx.needs_input_grad[6] else None
        g_tokens = (_from_chunks(g, layout, gy) for g in (gr, gk, gv))
        # log w = -exp(time_decay) is its own derivative.
        return *g_tokens, (g_log_w * log_w).to(time_decay.dtype), gu.to(u.dtype), None, g_state0


def _forward(r, k, v, powers, u, state, layout):
    """Chunks r, k, v [C, H, L, N] and states [n, H, N, N] -> y, the states at the end, pair scores and each chunk's first state."""
    from_start, to_end, over_chunk = _decays(powers, layout)
    written = (k * to_end).transpose(-1, -2) @ v
    starts = torch.empty_like(written)
    state = state.clone()
    for start, stop in layout.steps:
        here = state[: stop - start]
        starts[start:stop] = here
        torch.addcmul(written[start:stop], over_chunk[start:stop], here, out=here)
    scores = _pair_scores(r, k, powers, u)
    y = scores @ v + (r * from_start) @ starts
    return y, state, scores, starts


def _backward(r, k, v, powers, u, scores, starts, gy, g_state, layout):
    """Gradients of r, k, v (chunks), log w, u and the states at the start."""
    from_start, to_end, over_chunk = _decays(powers, layout)
    read = (r * from_start).transpose(-1, -2) @ gy
    g_ends = torch.empty_like(read)
    for start, stop in reversed(layout.steps):
        here = g_state[: stop - start]
        g_ends[start:stop] = here
        torch.addcmul(read[start:stop], over_chunk[start:stop], here, out=here)

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


def _halves(x, half):
    """[C, H, L, N] -> the first and second halves of its blocks of 2 * half tokens, each [C, H, L / (2 * half), half, N]."""
    n_chunks, n_heads, length, head_size = x.shape
    return x.view(n_chunks, n_heads, length // (2 * half), 2, half, head_size).unbind(3)


def _lower_left(scores, half):
    """View of [C, H, L, L]: lower left quarters of its diagonal blocks of 2 * half tokens, [C, H, L / (2 * half), half, half]."""
    n_chunks, n_heads, length, _ = scores.shape
    n_blocks = length // (2 * half)
    quarters = scores.view(n_chunks, n_heads, n_blocks, 2, half, n_blocks, 2, half)[:, :, :, 1, :, :, 0]
    return quarters.diagonal(dim1=2, dim2=4).movedim(-1, 2)


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
        _lower_left(scores, half).copy_(later @ earlier.transpose(-1, -2))
    scores.diagonal(dim1=-2, dim2=-1).copy_(((r * k) @ u[:, :, None]).squeeze(-1))
    return scores


def _add_pair_gradients(g_scores, r, k, powers, u, gr, gk, g_log_w):
    """Adds what _pair_scores owes to gr, gk and g_log_w, in place; returns the gradient of u."""
    for half in _levels():
        later, earlier, rising, falling = _faded_halves(r, k, powers, half)
        g = _lower_left(g_scores, half)
        g_later, g_earlier = _product(g, earlier), _product(g.transpose(-1, -2), later)
        _halves(gr, half)[1].addcmul_(g_later, rising)
        _halves(gk, half)[0].addcmul_(g_earlier, falling)
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
    return _halves(r, half)[1] * rising, _halves(k, half)[0] * falling, rising, falling


def _product(a, b):
    """a @ b. Batched products with an inner size of 1 or 2 run five times slower than the sum written out."""
    return a @ b if b.shape[-2] > 2 else sum(a[..., i, None] * b[..., None, i, :] for i in range(b.shape[-2]))


def _to_chunks(x, layout, dtype):
    """[S, H, N] -> [C, H, L, N], zeros where a chunk is not full."""
    x = x.to(dtype)
    if layout.slot is not None:
        x = x.new_zeros(layout.n_chunks * CHUNK, *x.shape[1:]).index_copy_(0, layout.slot, x)
    return x.reshape(layout.n_chunks, CHUNK, *x.shape[1:]).transpose(1, 2).contiguous()


def _from_chunks(x, layout, like):
    """The inverse of _to_chunks, in the type of `like`."""
    rows = x.transpose(1, 2).reshape(layout.n_chunks * CHUNK, *like.shape[1:])
    return (rows if layout.slot is None else rows[layout.slot]).to(like.dtype)
