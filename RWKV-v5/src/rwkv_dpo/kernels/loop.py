"""What the reference backends share: the walk over packed sequences, token by token."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# step(state, *rows of one token) -> y of the token, the next state
Step = Callable[..., tuple[Tensor, Tensor]]


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which type to compute: float64 for float64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def walk(step: Step, rows: Sequence[Tensor], cu_seqlens: Tensor, state0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs a recurrence over rows [S, H, N] from states [n, H, N, N]: (y [S, H, N] in the type of the first rows, states at the ends)."""
    first, n_seqs = rows[0], cu_seqlens.numel() - 1
    _, n_heads, head_size = first.shape
    dtype = wide(first.dtype)
    if state0 is None:
        state0 = torch.zeros(n_seqs, n_heads, head_size, head_size, dtype=dtype, device=first.device)
    ys, ends = [], []
    bounds = cu_seqlens.tolist()
    for s in range(n_seqs):
        state = state0[s].to(dtype)
        for t in range(bounds[s], bounds[s + 1]):
            y, state = step(state, *(x[t].to(dtype) for x in rows))
            ys.append(y)
        ends.append(state)
    return torch.stack(ys).to(first.dtype) if ys else first.clone(), torch.stack(ends) if ends else state0
