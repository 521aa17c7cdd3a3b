"""WKV-5 as the loop that defines it: slow, plainly right, in any dtype including float64. The oracle of every test."""

import torch

from rwkv_dpo.kernels.loop import walk, wide


def unusable_because(device: torch.device) -> str | None:
    """None: it runs on any device."""
    return None


def wkv5(r, k, v, time_decay, u, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv5 for shapes. Computes in float64 for float64 inputs, in fp32 otherwise; autograd does the rest."""
    dtype = wide(r.dtype)
    w = torch.exp(-decay_rate(time_decay.to(dtype)))[:, :, None]
    u = u.to(dtype)[:, :, None]

    def step(state, r, k, v):
        kv = k[:, :, None] * v[:, None, :]
        # A sum, not a matrix product: autocast would round a product to 16 bits.
        return (r[:, :, None] * (state + u * kv)).sum(1), w * state + kv

    return walk(step, (r, k, v), cu_seqlens, state0)


def decay_rate(time_decay: torch.Tensor) -> torch.Tensor:
    """-log w = exp(time_decay), in its type.

    The bound changes no w and no gradient: beyond 6.7 both are 0 in float64 too. Without it, exp overflows from 88.8 in fp32 and
    from 709.8 in float64, and infinity times a w, or a step count, of 0 is NaN.
    """
    return torch.exp(time_decay.clamp(max=10))
