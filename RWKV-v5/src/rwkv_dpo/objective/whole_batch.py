"""Losses over a batch whose pairs the ranks share: each computes the same value of all pairs, and its gradient for its own."""

from collections.abc import Callable

import torch
import torch.distributed
from torch import Tensor

from rwkv_dpo.objective.preferences import Preferences


def across_ranks(given: Preferences, loss_of: Callable[[Preferences], Tensor]) -> Tensor:
    """loss_of the pairs of all ranks. Its gradient is times the number of ranks: strategies take the mean of theirs, and this is a part
    of a sum."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        return loss_of(given)
    n_ranks, own = group.get_world_size(), len(given.logps)
    counts = [torch.zeros(1, dtype=torch.int64, device=given.logps.device) for _ in range(n_ranks)]
    group.all_gather(counts, torch.full_like(counts[0], own))
    sizes = [int(count) for count in counts]
    # In one exchange, each rank's as long as the longest.
    weights = torch.ones_like(given.logps[:, 0]) if given.weights is None else given.weights
    mine = torch.cat([given.logps.detach(), given.ref_logps, given.lengths, weights[:, None]], 1)
    padded = mine.new_zeros(max(sizes), mine.shape[1])
    padded[:own] = mine
    everyones = [torch.empty_like(padded) for _ in sizes]
    group.all_gather(everyones, padded)
    parts = [part[:size] for part, size in zip(everyones, sizes, strict=True)]
    rank = group.get_rank()
    logps = torch.cat([given.logps if i == rank else part[:, :2] for i, part in enumerate(parts)])
    ref_logps, lengths, weights = torch.cat(parts)[:, 2:].split((2, 2, 1), dim=1)
    loss = loss_of(Preferences(logps, ref_logps, lengths, given.compared, weights[:, 0]))
    return loss + (n_ranks - 1) * (loss - loss.detach())
