"""WKV-7, the recurrence at the heart of RWKV-7: its contract. rwkv_dpo.kernels.backends chooses among its implementations.

Legend, as in the Goose paper (arXiv:2503.14456): r receptance, k key, v value, w the decay, which each token has of its own; a what a
token takes out of the state (-kk of the paper) and b where that is put back (kk * a of the paper); S[i, j] the state of one head (key
index i, value index j).

    S[i, j] <- w_t[i] * S[i, j] + b_t[i] * (sum_m a_t[m] * S[m, j]) + k_t[i] * v_t[j]
    y_t[j] = sum_i r_t[i] * S[i, j]                                                      of the new state

Every backend module offers two functions:

    wkv7(r, k, v, a, b, log_w, cu_seqlens, state0=None) -> (y, state_end)
        a, b         [S, H, N] in the dtype of r
        log_w        [S, H, N] log of w, from -exp(-0.5) to 0; any float dtype, used in fp32
        all others   as rwkv_dpo.kernels.wkv5 has them

    Differentiable in r, k, v, a, b, log_w and state0, through y and state_end alike. N is a multiple of 8 up to 128.

    unusable_because(device) -> str | None
        As rwkv_dpo.kernels.wkv5 has it.
"""
