"""WKV-5 as the loop that defines it: slow, plainly right, in any dtype including float64. The oracle of every test."""

import torch

from rwkv_dpo.kernels.loop import walk, wide
from rwkv_dpo.kernels.wkv5.common import decay_rate


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
