"""WKV-6, the recurrence at the heart of RWKV-6: its contract. rwkv_dpo.kernels.backends chooses among its implementations.

Legend, as in the Finch paper (arXiv:2404.05892): r receptance, k key, v value, u bonus of the current token (time_faaaa), w the decay,
which each token has of its own, S[i, j] the state of one head (key index i, value index j).

    y_t[j] = sum_i r_t[i] * (S[i, j] + u[i] * k_t[i] * v_t[j])
    S[i, j] <- w_t[i] * S[i, j] + k_t[i] * v_t[j]

Every backend module offers two functions:

    wkv6(r, k, v, log_w, u, cu_seqlens, state0=None) -> (y, state_end)
        log_w        [S, H, N] log of w, at most 0, with no lower bound; any float dtype, used in fp32
        all others   as rwkv_dpo.kernels.wkv5 has them

    Differentiable in r, k, v, log_w, u and state0, through y and state_end alike. N is a multiple of 8 up to 128.

    unusable_because(device) -> str | None
        As rwkv_dpo.kernels.wkv5 has it.
"""
