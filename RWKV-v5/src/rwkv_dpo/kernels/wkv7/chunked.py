"""WKV-7 as matrix products over chunks of tokens, in plain PyTorch: for any device, and for float64.

Decays are cumulated within a chunk, P_t = w_1 .. w_t, rows being tokens and S [value, key] here:

    A~ = P_{t-1} a    R~ = P_t r    B~ = b / P_t    K~ = k / P_t    B^ = P_l B~    K^ = P_l K~         P_l over the whole chunk
    M = tril(A~ B~^T, -1)    E = tril(A~ K~^T, -1)    F = tril(R~ B~^T)    D = tril(R~ K~^T)    T = (I - M)^-1
    U = T (A~ S^T + E V)     Y = R~ S^T + F U + D V     S' = S diag(P_l) + U^T B^ + V^T K^

U holds what each token takes out of the state. The bound on w keeps 1 / P_t below e^(0.6065 CHUNK) = 16,000.
With G = dL/dS the backward walks from the last chunk to the first.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_dpo.kernels.chunks import first_states, from_chunks, in_order, lay_out, to_chunks
from rwkv_dpo.kernels.loop import wide

# 1 / P would leave fp32 at 146.
CHUNK = 16


def unusable_because(device: torch.device) -> str | None:
    """None: it runs on any device."""
    return None


def wkv7(r, k, v, a, b, log_w, cu_seqlens, state0=None):
    """See rwkv_dpo.kernels.wkv7 for shapes. Computes in float64 for float64 inputs, in fp32 otherwise."""
    return _Wkv7.apply(r, k, v, a, b, log_w, cu_seqlens, state0)


class _Wkv7(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, a, b, log_w, cu_seqlens, state0):
        layout = lay_out(cu_seqlens, CHUNK, r.device)
        with torch.autocast(r.device.type, enabled=False):
            rows = [to_chunks(x, layout, wide(r.dtype)) for x in (r, k, v, a, b, log_w)]
            state = first_states(state0, layout, rows[0]).transpose(-1, -2).contiguous()
            y, taken, starts = _forward(_chunk_of(*rows), state, layout)
            state_end = in_order(state.transpose(-1, -2), layout)
        ctx.layout, ctx.type_of_log_w = layout, log_w.dtype
        ctx.save_for_backward(*rows, taken, starts)
        return from_chunks(y, layout, r), state_end

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_state_end):
        *rows, taken, starts = ctx.saved_tensors
        layout = ctx.layout
        with torch.autocast(gy.device.type, enabled=False):
            g_state = g_state_end.transpose(-1, -2)[layout.order]
            *grads, g_log_w = _backward(_chunk_of(*rows), taken, starts, to_chunks(gy, layout, rows[0].dtype), g_state, layout)
            g_state0 = in_order(g_state.transpose(-1, -2), layout) if ctx.needs_input_grad[7] else None
        like_log_w = gy.new_empty(0, *gy.shape[1:], dtype=ctx.type_of_log_w)
        return *(from_chunks(g, layout, gy) for g in grads), from_chunks(g_log_w, layout, like_log_w), None, g_state0


class _Chunk(NamedTuple):
    """The letters of this module's first lines; [C, H, L, N], but M, E, F, D, T [C, H, L, L] and whole, which is P_l, [C, H, 1, N]."""

    r: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    P: Tensor
    P_before: Tensor
    whole: Tensor
    A: Tensor
    R: Tensor
    B: Tensor
    K: Tensor
    M: Tensor
    E: Tensor
    F: Tensor
    D: Tensor

    def solve(self, x: Tensor, transposed: bool = False) -> Tensor:
        """T x, or T^T x."""
        matrix = torch.eye(CHUNK, dtype=x.dtype, device=x.device) - self.M
        if transposed:
            return torch.linalg.solve_triangular(matrix.transpose(-1, -2), x, upper=True, unitriangular=True)
        return torch.linalg.solve_triangular(matrix, x, upper=False, unitriangular=True)


def _chunk_of(r, k, v, a, b, log_w) -> _Chunk:
    sums = log_w.cumsum(2)
    P, P_before, inverse = sums.exp(), torch.cat([torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]], 2).exp(), (-sums).exp()
    A, R, B, K = a * P_before, r * P, b * inverse, k * inverse
    B_T, K_T = B.transpose(-1, -2), K.transpose(-1, -2)
    M, E, F, D = (A @ B_T).tril(-1), (A @ K_T).tril(-1), (R @ B_T).tril(), (R @ K_T).tril()
    return _Chunk(r, k, v, a, b, P, P_before, P[:, :, -1:], A, R, B, K, M, E, F, D)


def _forward(c, state, layout):
    """States [n, H, value, key] -> y, U [C, H, L, N] and each chunk's first state; the states become those at the end."""
    own, W = c.solve(c.E @ c.v), c.solve(c.A)
    B_end, written = c.B * c.whole, c.v.transpose(-1, -2) @ (c.K * c.whole)
    taken, starts = torch.empty_like(own), torch.empty_like(written)
    for start, stop in layout.steps:
        here, now = state[: stop - start], slice(start, stop)
        starts[now] = here
        torch.add(own[now], W[now] @ here.transpose(-1, -2), out=taken[now])
        here.mul_(c.whole[now]).add_(written[now]).add_(taken[now].transpose(-1, -2) @ B_end[now])
    return c.R @ starts.transpose(-1, -2) + c.F @ taken + c.D @ c.v, taken, starts


def _backward(c, taken, starts, gy, g_state, layout):
    """Gradients of r, k, v, a, b and log w (chunks); g_state becomes that of the states at the start."""
    W, B_end = c.solve(c.A), c.B * c.whole
    from_y, read = c.F.transpose(-1, -2) @ gy, gy.transpose(-1, -2) @ c.R
    dU, ends = torch.empty_like(from_y), torch.empty_like(read)
    for start, stop in reversed(layout.steps):
        here, now = g_state[: stop - start], slice(start, stop)
        ends[now] = here
        torch.add(from_y[now], B_end[now] @ here.transpose(-1, -2), out=dU[now])
        here.mul_(c.whole[now]).add_(read[now]).add_(dU[now].transpose(-1, -2) @ W[now])
    X = c.solve(dU, transposed=True)
    U_T, v_T = taken.transpose(-1, -2), c.v.transpose(-1, -2)
    dM, dE, dF, dD = (X @ U_T).tril(-1), (X @ v_T).tril(-1), (gy @ U_T).tril(), (gy @ v_T).tril()
    dv = c.D.transpose(-1, -2) @ gy + (c.K * c.whole) @ ends.transpose(-1, -2) + c.E.transpose(-1, -2) @ X
    dr = (gy @ starts + dF @ c.B + dD @ c.K) * c.P
    da = (X @ starts + dM @ c.B + dE @ c.K) * c.P_before
    # c.whole / c.P is at most 1, and never a quotient of decays that vanish.
    db = (dM.transpose(-1, -2) @ c.A + dF.transpose(-1, -2) @ c.R + (taken @ ends) * c.whole) / c.P
    dk = (dE.transpose(-1, -2) @ c.A + dD.transpose(-1, -2) @ c.R + (c.v @ ends) * c.whole) / c.P
    return dr, dk, dv, da, db, _gradient_of_log_w(c, dr, dk, da, db, taken, starts, ends)


def _gradient_of_log_w(c, dr, dk, da, db, taken, starts, ends):
    """sum_{s>=t} (r dr - k dk - b db)_s + sum_{s>t} (a da)_s + sum over values of S' G."""
    after = starts * c.whole + taken.transpose(-1, -2) @ (c.B * c.whole) + c.v.transpose(-1, -2) @ (c.K * c.whole)
    a_da = c.a * da
    flow = c.r * dr - c.k * dk - c.b * db + a_da
    return flow.flip(2).cumsum(2).flip(2) - a_da + (after * ends).sum(-2, keepdim=True)
