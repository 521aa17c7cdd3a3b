"""What one model call of an optimizer step sees."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from rwkv_dpo.batches.chunks import ChunkPlan, plan_chunks
from rwkv_dpo.batches.step import Step, build_step
from rwkv_dpo.data.pairs import Pair


@dataclass(frozen=True)
class Shares:
    """What a micro-batch's parts count for in its optimizer step, whose loss is the mean over groups of samples, however they are shared
    out: factors of the windows' mean, of each pair's value [P] and of each ranking's [R], float64, so that the mean over the model calls
    of all ranks is the step's loss. chosen_lengths [P]: mean tokens of the chosen answers in the group of each pair."""

    windows: float
    pairs: Tensor
    rankings: Tensor
    chosen_lengths: Tensor

    def to(self, device: torch.device) -> "Shares":
        """On another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "windows"}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class MicroBatch:
    """What one model call sees. ref_logps: fp32 [pairs, 2], nats, chosen then rejected. plan: the step in chunks, when it is to run so.
    shares: in an optimizer step; None: it is looked at by itself. numbers: of the pairs in their set, where they have one."""

    step: Step
    ref_logps: Tensor
    n_windows: int
    plan: ChunkPlan | None = None
    shares: Shares | None = None
    numbers: tuple[int, ...] = ()

    def to(self, device: torch.device) -> "MicroBatch":
        """On another device."""
        plan, shares = self.plan.to(device) if self.plan else None, self.shares.to(device) if self.shares else None
        refs = self.ref_logps.to(device, non_blocking=True)
        return replace(self, step=self.step.to(device), ref_logps=refs, plan=plan, shares=shares)


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
