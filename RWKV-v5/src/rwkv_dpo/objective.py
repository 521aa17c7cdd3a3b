"""From windows and pairs to a loss and its metrics: one path for training, evaluation and reference scoring."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rwkv_dpo.chunked_step import score_chunks, truncated_loss
from rwkv_dpo.chunks import ChunkPlan, plan_chunks
from rwkv_dpo.data.pairs import Pair, PairSet
from rwkv_dpo.forest import Step, build_step
from rwkv_dpo.linear_logprobs import LogProbs
from rwkv_dpo.losses import DPOTerms, dpo_loss, l2wrap, mix
from rwkv_dpo.model.rwkv import RWKV


@dataclass(frozen=True)
class MicroBatch:
    """What one optimizer micro-step sees. ref_logps: fp32 [pairs, 2], nats, chosen then rejected. plan: the step in chunks, when it
    is to run so."""

    step: Step
    ref_logps: Tensor
    n_windows: int
    plan: ChunkPlan | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        plan = self.plan.to(device) if self.plan else None
        return MicroBatch(self.step.to(device), self.ref_logps.to(device, non_blocking=True), self.n_windows, plan)


def collate(
    windows: Sequence[np.ndarray], pairs: Sequence[Pair], ref_logps: np.ndarray, chunk_ctx: int = 0, truncated: bool = False
) -> MicroBatch:
    """Windows [T + 1] token ids each; pairs of (prompt, chosen, rejected) ids with their reference log-probs [pairs, 2].
    chunk_ctx: tokens in a chunk; 0: everything at once. truncated: states carry no gradients from chunk to chunk."""
    step = build_step(windows, pairs)
    refs = torch.from_numpy(ref_logps.reshape(-1, 2).astype(np.float32))
    return MicroBatch(step, refs, len(windows), plan_chunks(step, chunk_ctx, truncated) if chunk_ctx else None)


def score_rows(model: RWKV, step: Step, plan: ChunkPlan | None = None) -> LogProbs:
    """Log-probabilities and largest logits of the step's scored rows: the one model call of a micro-batch, or one a chunk."""
    if plan:
        return score_chunks(model, plan)
    hidden, _ = model(step.forest)
    return model.head(hidden.index_select(0, step.scored_rows), step.targets, lean=model.is_lean)


def answer_logps(logps: Tensor, step: Step) -> Tensor:
    """Sums over each answer's tokens [pairs, 2]: chosen, rejected. fp32."""
    sums = logps.new_zeros(2 * step.n_pairs)
    return sums.index_add(0, step.entry_answers, logps.index_select(0, step.entry_rows)).view(-1, 2)


def objective(model: RWKV, batch: MicroBatch, beta: float, ratio: float) -> tuple[Tensor, dict[str, Tensor]]:
    """ratio * LM + (1 - ratio) * DPO of one micro-batch, and metrics under TRL's names (0-d tensors, means over the batch).

    A micro-batch without windows needs ratio 0, one without pairs ratio 1.
    """
    n, plan, truncated = batch.step.n_window_rows, batch.plan, None
    if plan and plan.n_window_chunks and model.compute_dtype != torch.float16:
        truncated = truncated_loss(model, plan, general_loss)
        plan = replace(plan, chunks=plan.chunks[plan.n_window_chunks :])
    rows = score_rows(model, batch.step, plan)
    metrics: dict[str, Tensor] = {}
    loss_general = loss_dpo = rows.logps.new_zeros(())
    if n:
        loss_general = general_loss(LogProbs(rows.logps[:n], rows.max_logits[:n])) if truncated is None else truncated
        metrics["loss_general"] = loss_general.detach()
    if batch.step.n_pairs:
        logps = answer_logps(rows.logps, batch.step)
        terms = dpo_loss(logps, batch.ref_logps.to(logps.dtype), beta)
        loss_dpo = terms.losses.mean()
        metrics |= pair_metrics(logps, batch.ref_logps, terms)
    loss = mix(loss_general, loss_dpo, ratio)
    metrics["loss"] = loss.detach()
    return loss, metrics


def general_loss(rows: LogProbs) -> Tensor:
    """Mean cross-entropy of corpus rows, with L2Wrap in its gradient."""
    return l2wrap(-rows.logps.mean(), rows.max_logits)


def pair_metrics(logps: Tensor, ref_logps: Tensor, terms: DPOTerms) -> dict[str, Tensor]:
    """Means over pairs [pairs, 2]. rewards/accuracies: the share of pairs whose chosen answer has the larger reward."""
    margins = terms.chosen_rewards - terms.rejected_rewards
    values = {
        "loss_dpo": terms.losses.detach(),
        "rewards/chosen": terms.chosen_rewards,
        "rewards/rejected": terms.rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins.dtype),
        "logps/chosen": logps[:, 0].detach(),
        "logps/rejected": logps[:, 1].detach(),
        "ref_logps/chosen": ref_logps[:, 0],
        "ref_logps/rejected": ref_logps[:, 1],
    }
    return {name: value.mean() for name, value in values.items()}


def score_pairs(model: RWKV, pairs: PairSet, batch_tokens: int, progress: Callable[[int], object] = lambda n: None) -> np.ndarray:
    """Log-probabilities of both answers of every pair under `model`: float64 [pairs, 2], nats, each an fp32 sum.

    Pairs go through in the batches of scoring_batches; `progress` is told how many each batch held.
    """
    result = np.full((len(pairs), 2), np.nan)
    for rows in scoring_batches(pairs, batch_tokens):
        result[rows] = score_batch(model, pairs, rows, batch_tokens)
        progress(len(rows))
    return result


@torch.no_grad()
def score_batch(model: RWKV, pairs: PairSet, rows: np.ndarray, batch_tokens: int) -> np.ndarray:
    """Log-probabilities [len(rows), 2] of both answers of those pairs, computing a shared prompt once: in one model call, or, where
    they are more than batch_tokens tokens, in chunks of so many."""
    step = build_step([], [pairs.pair(i) for i in rows], share_prompts=True)
    logps = _score_in_parts(model, step, batch_tokens).logps
    return answer_logps(logps, step.to(logps.device)).double().cpu().numpy()


def _score_in_parts(model: RWKV, step: Step, batch_tokens: int) -> LogProbs:
    """score_rows of a step on the CPU, with no more than batch_tokens tokens at once."""
    device = model.head.weight.device
    plan = plan_chunks(step, batch_tokens).to(device) if step.forest.tokens.numel() > batch_tokens else None
    return score_rows(model, step.to(device), plan)


def scoring_batches(pairs: PairSet, batch_tokens: int) -> list[np.ndarray]:
    """Rows of the pairs that are scored together: up to batch_tokens tokens, sorted by length, pairs with the same prompt side by side
    (its tokens count once). The same for the same pairs, whatever was scored before."""
    sharing: dict[bytes, list[int]] = {}
    for i in range(len(pairs)):
        sharing.setdefault(pairs.pair(i)[0].tobytes(), []).append(i)
    parts = np.diff(pairs.offsets).reshape(-1, 3)
    n_prompt, n_answers = parts[:, 0], parts[:, 1] + parts[:, 2]
    # A prompt that more pairs share than fit is computed once in each batch.
    groups = []
    for rows in sharing.values():
        room = batch_tokens - n_prompt[rows[0]]
        groups += [np.array(rows)[batch] for batch in token_batches(np.arange(len(rows)), n_answers[rows], room)]
    lengths = np.array([n_prompt[rows[0]] + n_answers[rows].sum() for rows in groups])
    batches = token_batches(np.argsort(lengths, kind="stable"), lengths, batch_tokens)
    return [np.concatenate([groups[i] for i in batch]) for batch in batches]


def token_batches(order: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Cuts `order` into runs of at most batch_tokens tokens, each of at least one item."""
    batches: list[np.ndarray] = []
    current: list[int] = []
    n_tokens = 0
    for i in order:
        if current and n_tokens + lengths[i] > batch_tokens:
            batches.append(np.array(current))
            current, n_tokens = [], 0
        current.append(i)
        n_tokens += lengths[i]
    return [*batches, np.array(current)] if current else batches


@torch.no_grad()
def corpus_loss(model: RWKV, windows: Iterable[np.ndarray], batch_tokens: int) -> float:
    """Mean negative log-likelihood (nats a token) of windows of [T + 1] token ids, up to batch_tokens tokens at once."""
    total, count = 0.0, 0
    for window in windows:
        logps = _score_in_parts(model, build_step([window], []), batch_tokens).logps
        total, count = total - float(logps.double().sum()), count + logps.numel()
    return total / count
