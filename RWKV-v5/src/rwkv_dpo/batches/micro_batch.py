"""What one optimizer micro-step sees."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rwkv_dpo.batches.chunks import ChunkPlan, plan_chunks
from rwkv_dpo.batches.step import Step, build_step
from rwkv_dpo.data.pairs import Pair


@dataclass(frozen=True)
class MicroBatch:
    """What one optimizer micro-step sees. ref_logps: fp32 [pairs, 2], nats, chosen then rejected. plan: the step in chunks, when it
    is to run so. pair_share, ranking_share: by what the mean over its pairs, or rankings, is to be multiplied, so that the mean over
    the ranks is that over all of their pairs. numbers: of the pairs in their set, where they have one."""

    step: Step
    ref_logps: Tensor
    n_windows: int
    plan: ChunkPlan | None = None
    pair_share: float = 1.0
    ranking_share: float = 1.0
    numbers: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "MicroBatch":
        """On another device."""
        plan = self.plan.to(device) if self.plan else None
        return replace(self, step=self.step.to(device), ref_logps=self.ref_logps.to(device, non_blocking=True), plan=plan)


def collate(
    windows: Sequence[np.ndarray], pairs: Sequence[Pair], ref_logps: np.ndarray, chunk_ctx: int = 0, truncated: bool = False,
    trees: Sequence[Sequence[int]] | None = None, scores: np.ndarray | None = None,
) -> MicroBatch:  # fmt: skip
    """Windows [T + 1] token ids each; pairs of (prompt, chosen, rejected) ids with their reference log-probs [pairs, 2]; their trees and
    scores as build_step takes them.
    chunk_ctx: tokens in a chunk; 0: everything at once. truncated: states carry no gradients from chunk to chunk."""
    step = build_step(windows, pairs, trees, scores)
    refs = torch.from_numpy(ref_logps.reshape(-1, 2).astype(np.float32))
    return MicroBatch(step, refs, len(windows), plan_chunks(step, chunk_ctx, truncated) if chunk_ctx else None)
