"""What a block of RWKV-6 or RWKV-7 keeps for its backward pass, in bytes per token."""

from rwkv_dpo.model.checkpoint import MIXES
from rwkv_dpo.model.shape import ModelShape


def kept_by_newer_block(shape: ModelShape, compute_bytes: int, wkv_backend: str) -> float:
    """Without recomputation, by the names of rwkv_dpo.model.v6 and v7.

    Beside rows in the compute dtype there is log w, which is fp32.
    """
    s = shape
    ranks = s.ranks or tuple(rank(s.n_embd) for rank in MIXES[s.version].ranks.values())
    # Of 6: the residual stream twice, the norm's rows and those before them, the channel mix's gate and what it gates; r, k, v, g, y.
    # Of 7: the residual stream twice; r, g, y; k and a, and what becomes of them: k, what is taken out and put back; v, and what becomes of
    # it: how much of the first layer's v it takes, and v.
    rows = 6.0 * s.n_embd + 5.0 * s.dim_att if s.version == "6" else 2.0 * s.n_embd + 11.0 * s.dim_att
    return compute_bytes * (rows + s.dim_ffn + sum(ranks)) + 4.0 * s.dim_att + _kept_by_wkv(s, compute_bytes, wkv_backend)


def _kept_by_wkv(s: ModelShape, compute_bytes: int, wkv_backend: str) -> float:
    """States, and fp32 copies of the inputs; of RWKV-6's, r, k and v are in place of the rows, as are two of RWKV-7's."""
    state, is_7 = 4.0 * s.dim_att * s.head_size, s.version == "7"
    match wkv_backend:
        case "chunked" if is_7:
            return state / 16 + (28.0 - 2 * compute_bytes) * s.dim_att
        case "chunked":
            return state / 32 + (16.0 - 3 * compute_bytes) * s.dim_att + 4.0 * 32 * s.n_head
        case "reference":
            return (5.0 if is_7 else 3.0) * state
        case "cuda":
            # What each token takes out of RWKV-7's state.
            return state / 32 + (4.0 * s.dim_att if is_7 else 0.0)
        case _:
            return 0.0
