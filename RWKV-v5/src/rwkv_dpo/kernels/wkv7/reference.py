"""WKV-7 as the loop that defines it: slow, plainly right, in any dtype including float64. The oracle of every test."""

import torch

from rwkv_dpo.kernels.loop import walk


def unusable_because(device: torch.device) -> str | None:
    """None: it runs on any device."""
    return None


def wkv7(r, k, v, a, b, log_w, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv7 for shapes. Computes in float64 for float64 inputs, in fp32 otherwise; autograd does the rest."""

    def step(state, r, k, v, a, b, log_w):
        # Sums, not matrix products: autocast would round a product to 16 bits.
        taken = (a[:, :, None] * state).sum(1)
        state = torch.exp(log_w)[:, :, None] * state + b[:, :, None] * taken[:, None, :] + k[:, :, None] * v[:, None, :]
        return (r[:, :, None] * state).sum(1), state

    return walk(step, (r, k, v, a, b, log_w), cu_seqlens, state0)
