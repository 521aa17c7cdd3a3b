"""What the chunked backends share: how packed sequences are cut into chunks of tokens, and the walk over the chunks' states."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_dpo.kernels.backends import bytes_of


class Layout(NamedTuple):
    """How sequences are cut into chunks. Chunks are ordered in steps: the first chunk of every sequence that has one, longest
    sequence first, then the second chunks, and so on. So each step works on a prefix of the sequences of the step before."""

    slot: Tensor | None  # int64 [S]: where each token goes among n_chunks * chunk rows; None when it stays where it is
    lengths: Tensor  # int64 [n_chunks], or [1] when all chunks are full
    steps: list[tuple[int, int]]  # chunks start:stop of each step
    order: Tensor  # int64 [n]: sequences from the longest to the shortest
    n_chunks: int
    chunk: int  # rows of a chunk


def lay_out(cu_seqlens: Tensor, chunk: int, device: torch.device) -> Layout:
    """cu_seqlens int32 [n + 1] on the CPU; chunk: tokens of a full one."""
    return _lay_out(bytes_of(cu_seqlens), chunk, device)


# The layers of a model share their batch's layouts, one for each level of its forest; a few more are kept for batches in chunks.
@lru_cache(maxsize=64)
def _lay_out(cu_seqlens: bytes, chunk: int, device: torch.device) -> Layout:
    bounds = torch.frombuffer(bytearray(cu_seqlens), dtype=torch.int32).long()
    lengths = bounds.diff()
    n_tokens = int(lengths.sum())
    sorted_lengths, order = lengths.sort(descending=True, stable=True)
    n_steps = int(-(-sorted_lengths[0] // chunk)) if len(order) else 0
    # left[i, s]: tokens of the s-th longest sequence that remain before step i.
    left = sorted_lengths - chunk * torch.arange(n_steps)[:, None]
    stops = (left > 0).sum(1).cumsum(0).tolist()
    chunk_lengths = left[left > 0].clamp(max=chunk)
    n_chunks = len(chunk_lengths)
    slot = None
    if n_tokens < n_chunks * chunk or len(lengths) > 1:
        chunk_of = torch.zeros(n_steps, len(order), dtype=torch.long)
        chunk_of[left > 0] = torch.arange(n_chunks)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        sequence = torch.repeat_interleave(torch.arange(len(order)), lengths)
        position = torch.arange(n_tokens) - bounds[:-1][sequence]
        slot = (chunk_of[position // chunk, rank[sequence]] * chunk + position % chunk).to(device, non_blocking=True)
    if n_tokens == n_chunks * chunk:
        chunk_lengths = torch.tensor([chunk])
    steps = list(zip([0, *stops], stops, strict=False))
    # Blocking copies would wait for all that the device has been given to do.
    return Layout(slot, chunk_lengths.to(device, non_blocking=True), steps, order.to(device, non_blocking=True), n_chunks, chunk)


def to_chunks(x: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """[S, H, N] -> [C, H, L, N], zeros where a chunk is not full."""
    x = x.to(dtype)
    if layout.slot is not None:
        x = x.new_zeros(layout.n_chunks * layout.chunk, *x.shape[1:]).index_copy_(0, layout.slot, x)
    return x.reshape(layout.n_chunks, layout.chunk, *x.shape[1:]).transpose(1, 2).contiguous()


def from_chunks(x: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """The inverse of to_chunks, in the type of `like`."""
    rows = x.transpose(1, 2).reshape(layout.n_chunks * layout.chunk, *like.shape[1:])
    return (rows if layout.slot is None else rows[layout.slot]).to(like.dtype)


def first_states(state0: Tensor | None, layout: Layout, like: Tensor) -> Tensor:
    """A copy of the states [n, H, N, N] that sequences begin from, the longest sequence first, in the type of chunks [C, H, L, N]."""
    _, n_heads, _, head_size = like.shape
    if state0 is None:
        return like.new_zeros(len(layout.order), n_heads, head_size, head_size)
    return state0.to(like.dtype)[layout.order]


def in_order(states: Tensor, layout: Layout) -> Tensor:
    """States of the longest sequence first, as the sequences came."""
    return torch.empty_like(states).index_copy_(0, layout.order, states)


def scan_decayed(added: Tensor, over_chunk: Tensor, state: Tensor, layout: Layout, backwards: bool = False) -> Tensor:
    """state <- over_chunk * state + added, chunk by chunk: the states before each chunk [C, H, N, N]. `state` becomes the last.

    added [C, H, N, N], over_chunk [C, H, N, 1], state [n, H, N, N]; backwards begins with the last chunks.
    """
    before = torch.empty_like(added)
    for start, stop in reversed(layout.steps) if backwards else layout.steps:
        here = state[: stop - start]
        before[start:stop] = here
        torch.addcmul(added[start:stop], over_chunk[start:stop], here, out=here)
    return before


def halves(x: Tensor, half: int) -> tuple[Tensor, ...]:
    """[C, H, L, N] -> the first and second halves of its blocks of 2 * half tokens, each [C, H, L / (2 * half), half, N]."""
    n_chunks, n_heads, length, head_size = x.shape
    return x.view(n_chunks, n_heads, length // (2 * half), 2, half, head_size).unbind(3)


def lower_left(scores: Tensor, half: int) -> Tensor:
    """View of [C, H, L, L]: lower left quarters of its diagonal blocks of 2 * half tokens, [C, H, L / (2 * half), half, half]."""
    n_chunks, n_heads, length, _ = scores.shape
    n_blocks = length // (2 * half)
    quarters = scores.view(n_chunks, n_heads, n_blocks, 2, half, n_blocks, 2, half)[:, :, :, 1, :, :, 0]
    return quarters.diagonal(dim1=2, dim2=4).movedim(-1, 2)


def small_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. Batched products with an inner size of 1 or 2 run five times slower than the sum written out."""
    return a @ b if b.shape[-2] > 2 else sum(a[..., i, None] * b[..., None, i, :] for i in range(b.shape[-2]))  # type: ignore[return-value]
