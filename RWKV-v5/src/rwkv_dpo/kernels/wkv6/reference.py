"""WKV-6 as the loop that defines it: slow, plainly right, in any dtype including float64. The oracle of every test."""

import torch

from rwkv_dpo.kernels.loop import walk, wide


def unusable_because(device: torch.device) -> str | None:
    """None: it runs on any device."""
    return None


def wkv6(r, k, v, log_w, u, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv6 for shapes. Computes in float64 for float64 inputs, in fp32 otherwise; autograd does the rest."""
    u = u.to(wide(r.dtype))[:, :, None]

    def step(state, r, k, v, log_w):
        kv = k[:, :, None] * v[:, None, :]
        # A sum, not a matrix product: autocast would round a product to 16 bits.
        return (r[:, :, None] * (state + u * kv)).sum(1), torch.exp(log_w)[:, :, None] * state + kv

    return walk(step, (r, k, v, log_w), cu_seqlens, state0)
