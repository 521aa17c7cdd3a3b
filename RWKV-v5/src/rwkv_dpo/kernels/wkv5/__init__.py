"""WKV-5, the recurrence at the heart of RWKV-5: its contract. rwkv_dpo.kernels.backends chooses among its implementations.

Legend, as in the Eagle paper (arXiv:2404.05892): r receptance, k key, v value, u bonus of the current token (time_faaaa),
w = exp(-exp(time_decay)) the decay, S[i, j] the state of one head (key index i, value index j).

    y_t[j] = sum_i r_t[i] * (S[i, j] + u[i] * k_t[i] * v_t[j])
    S[i, j] <- w[i] * S[i, j] + k_t[i] * v_t[j]

Every backend module offers two functions:

    wkv5(r, k, v, time_decay, u, cu_seqlens, state0=None) -> (y, state_end)
        r, k, v      [S, H, N] fp32, bf16 or fp16 (reference and chunked also float64), contiguous
        time_decay   [H, N] and u [H, N], any float dtype; used in fp32
        cu_seqlens   int32 [n + 1] on the CPU (layout, not data): sequence s holds rows cu_seqlens[s]:cu_seqlens[s + 1]
                     of r, k and v; a sequence may be empty
        state0       [n, H, N, N] fp32 (float64 for float64 inputs), or None for zeros
        y            [S, H, N] in the dtype of r
        state_end    [n, H, N, N] in the dtype of state0; an empty sequence hands its state0 on

    Differentiable in r, k, v, time_decay, u and state0, through y and state_end alike. N is a multiple of 8 up to 128.

        wkv5 may have an attribute `of_forest`: a function of (r, k, v, time_decay, u, cu_seqlens, parents, state0) with sequences that
        continue others, all in one call. parents int32 [n] on the CPU, in the order of their depth: whose state_end each begins from,
        or -1 for those, the first ones, that begin from state0 [n_roots, H, N, N]. The forest's builder vouches for both layouts.

    unusable_because(device) -> str | None
        None when the backend can run on that device here, else the reason, and what a user can do about it, in one line.
        May compile on first use.
"""
