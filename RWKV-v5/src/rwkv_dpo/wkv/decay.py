"""The decay of a head's state, w = exp(-exp(time_decay)), for any time_decay that a checkpoint may hold."""

import torch


def decay_rate(time_decay: torch.Tensor) -> torch.Tensor:
    """-log w = exp(time_decay), in its type.

    The bound changes no w and no gradient: beyond 6.7 both are 0 in float64 too. Without it, exp overflows from 88.8 in fp32 and
    from 709.8 in float64, and infinity times a w, or a step count, of 0 is NaN.
    """
    return torch.exp(time_decay.clamp(max=10))
