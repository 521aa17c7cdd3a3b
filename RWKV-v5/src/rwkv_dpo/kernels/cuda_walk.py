"""What WKV-6 and WKV-7 share on NVIDIA GPUs: a walk over the tokens that is split over values, and the gradients of segments.

csrc/wkv_walk.cuh and wkv_gradients.cuh have both. The forward keeps the state at the start of every segment for the backward, fp32
[n_segments, H, N, N]: at head size 64 two fp32 activations of the layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_dpo.kernels.cuda_library import CudaKernels, Segments, aligned, new_states

# Tokens per segment; mirrors kSegment in csrc/wkv_lanes.cuh. A segment's gradients replay its states, which shared memory has room for.
SEGMENT = 32


class WalkKernels(CudaKernels):
    """CudaKernels of a recurrence in which each token has its decay."""

    def __init__(self, name: str, forward: Sequence[str], backward: Sequence[str]) -> None:
        super().__init__(name, SEGMENT, forward, backward)

    def run_forward(
        self, segments: Segments, rows: dict[str, Tensor], keeps: bool, **others: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """y, state_end, and with `keeps` the states at the start of every segment. rows [S, H, N] by name, aligned."""
        y = torch.empty_like(rows["r"])
        state_end = new_states(rows["r"], len(segments.first) - 1)
        states = new_states(rows["r"], len(segments.rows)) if keeps else None
        self.run("forward", segments, **rows, **others, states=states, y=y, state_end=state_end)
        return y, state_end, states

    def run_backward(
        self, segments: Segments, rows: dict[str, Tensor], states: Tensor, gy: Tensor | None, g_state_end: Tensor | None,
        wants_state0: bool, **others: Tensor | None,
    ) -> tuple[list[Tensor], Tensor, Tensor | None]:  # fmt: skip
        """The gradients of the rows, in their order, of log w and of state0."""
        r = rows["r"]
        grads = {f"g{name}": torch.empty_like(x) for name, x in rows.items()}
        g_log_w = torch.empty(r.shape, dtype=torch.float32, device=r.device)
        g_state0 = new_states(r, len(segments.first) - 1) if wants_state0 else None
        self.run(
            "backward", segments, **rows, **others, **grads, states=states, state_grads=torch.empty_like(states), g_log_w=g_log_w,
            gy=torch.zeros_like(r) if gy is None else aligned(gy), g_state0=g_state0,
            g_state_end=None if g_state_end is None else aligned(g_state_end),
        )  # fmt: skip
        return list(grads.values()), g_log_w, g_state0
