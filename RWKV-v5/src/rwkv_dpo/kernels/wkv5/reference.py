"""WKV-5 as the loop that defines it: slow, plainly right, in any dtype including float64. The oracle of every test."""

import torch

from rwkv_dpo.kernels.wkv5.common import decay_rate


def unusable_because(device: torch.device) -> str | None:
    """None: it runs on any device."""
    return None


def wkv5(r, k, v, time_decay, u, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv5 for shapes. Computes in float64 for float64 inputs, in fp32 otherwise; autograd does the rest."""
    _, n_heads, head_size = r.shape
    n_seqs = cu_seqlens.numel() - 1
    dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    w = torch.exp(-decay_rate(time_decay.to(dtype)))
    u = u.to(dtype)
    if state0 is None:
        state0 = torch.zeros(n_seqs, n_heads, head_size, head_size, dtype=dtype, device=r.device)

    ys, ends = [], []
    bounds = cu_seqlens.tolist()
    for s in range(n_seqs):
        state = state0[s].to(dtype)
        for t in range(bounds[s], bounds[s + 1]):
            r_t, k_t, v_t = r[t].to(dtype), k[t].to(dtype), v[t].to(dtype)
            kv = k_t[:, :, None] * v_t[:, None, :]
            # A sum, not a matrix product: autocast would round a product to 16 bits.
            ys.append((r_t[:, :, None] * (state + u[:, :, None] * kv)).sum(1))
            state = w[:, :, None] * state + kv
        ends.append(state)
    y = torch.stack(ys).to(r.dtype) if ys else r.clone()
    state_end = torch.stack(ends) if ends else state0
    return y, state_end
