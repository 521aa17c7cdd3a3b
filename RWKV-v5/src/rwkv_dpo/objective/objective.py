"""From windows and pairs to a loss and its metrics: one path for training, evaluation and reference scoring."""

from dataclasses import replace

import torch
from torch import Tensor

from rwkv_dpo.batches.chunks import ChunkPlan
from rwkv_dpo.batches.micro_batch import MicroBatch
from rwkv_dpo.batches.step import Step
from rwkv_dpo.kernels.linear_logprobs import LogProbs, LogProbsAndCollisions, Scores
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.objective.chunked_step import score_chunks, truncated_loss
from rwkv_dpo.objective.losses import Mixture, l2wrap, mix, preference_loss
from rwkv_dpo.objective.preferences import Preferences, preferences

PAIR_METRICS = (
    "loss_dpo", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "ref_logps/chosen", "ref_logps/rejected",
)  # fmt: skip


def score_rows(model: RWKV, step: Step, plan: ChunkPlan | None = None) -> Scores:
    """Log-probabilities and largest logits of the step's scored rows: the one model call of a micro-batch, or one a chunk."""
    if plan:
        return score_chunks(model, plan)
    hidden, _ = model(step.forest)
    return model.head(hidden.index_select(0, step.scored_rows), step.targets, model.is_lean, model.finds_collisions)


def answer_logps(logps: Tensor, step: Step, ld_alpha: float = 1.0) -> Tensor:
    """Sums over the tokens of each pair's answers [pairs, 2]: chosen, rejected. fp32.

    ld_alpha: what tokens count for that an answer has beyond the length of the other one (LD-DPO: Liu et al. 2024, arXiv:2409.06411)."""
    of_entries, pairs = logps.index_select(0, step.entry_rows), step.compared.pairs
    sums = logps.new_zeros(step.compared.n_answers)
    whole = sums.index_add(0, step.entry_answers, of_entries)[pairs]
    if ld_alpha == 1:
        return whole
    # Entries come in the order of each answer's tokens. Sums up to a token are differences of sums over all, hence float64.
    order = torch.argsort(step.entry_answers, stable=True)
    up_to = torch.cat([of_entries.new_zeros(1, dtype=torch.float64), of_entries[order].double().cumsum(0)])
    lengths = step.compared.lengths
    first = (lengths.cumsum(0) - lengths)[pairs]
    shared = up_to[first + lengths[pairs].amin(1, keepdim=True)] - up_to[first]
    return ld_alpha * whole + (1 - ld_alpha) * shared.to(whole.dtype)


def pair_weights(rows: LogProbsAndCollisions, step: Step) -> Tensor:
    """WPO's weights of pairs [P], without gradient: how likely the policy itself is to write both answers, by the mean over their tokens
    of log p(token) - log sum p^2 (Zhou et al. 2024, arXiv:2406.11827, equation 2)."""
    aligned = answer_logps(rows.logps.detach() - rows.collisions, step)
    return (aligned / step.compared.lengths[step.compared.pairs]).sum(1).exp()


def objective(model: RWKV, batch: MicroBatch, mixture: Mixture, ratio: float) -> tuple[Tensor, dict[str, Tensor]]:
    """ratio * LM + (1 - ratio) * preference losses of one micro-batch, and metrics under TRL's names (0-d tensors, means over the batch).

    A micro-batch by itself needs ratio 0 without windows, and ratio 1 without pairs. One of an optimizer step may lack either, and its
    losses are multiplied by what it counts for there.
    """
    n, plan, shares, truncated = batch.step.n_window_rows, batch.plan, batch.shares, None
    if plan and plan.n_window_chunks and model.compute_dtype != torch.float16:
        truncated = truncated_loss(model, plan, general_loss)
        plan = replace(plan, chunks=plan.chunks[plan.n_window_chunks :])
    rows = score_rows(model, batch.step, plan)
    zero = loss_dpo = rows.logps.new_zeros(())
    # ZeRO-3 waits for ever where an output of a module has a gradient on one rank, and none on another that has no windows.
    loss_general = rows.max_logits[:0].sum() if ratio > 0 else zero
    # All micro-batches of a run have the same metrics, whatever they hold.
    metrics = dict.fromkeys((*(("loss_general",) if ratio > 0 else ()), *(PAIR_METRICS if ratio < 1 else ())), zero)
    if n:
        loss_general = general_loss(LogProbs(rows.logps[:n], rows.max_logits[:n])) if truncated is None else truncated
        metrics["loss_general"] = loss_general.detach()
        loss_general = loss_general * (shares.windows if shares else 1)
    if batch.step.n_pairs:
        given = preferences(answer_logps(rows.logps, batch.step, mixture.options.ld_alpha), batch.ref_logps, batch.step.compared)
        if isinstance(rows, LogProbsAndCollisions):
            given = given._replace(weights=pair_weights(rows, batch.step))
        if shares:
            given = given._replace(chosen_lengths=shares.chosen_lengths.to(given.logps.dtype))
        loss_dpo = preference_loss(given, mixture, shares)
        metrics |= pair_metrics(given, loss_dpo, mixture.options.beta)
    loss = mix(loss_general, loss_dpo, ratio)
    metrics["loss"] = loss.detach()
    return loss, metrics


def general_loss(rows: Scores) -> Tensor:
    """Mean cross-entropy of corpus rows, with L2Wrap in its gradient."""
    return l2wrap(-rows.logps.mean(), rows.max_logits)


def pair_metrics(given: Preferences, loss: Tensor, beta: float) -> dict[str, Tensor]:
    """Means over pairs, and their loss. rewards/accuracies: the share of pairs whose chosen answer has the larger reward, beta times its
    log-ratio."""
    logps = given.logps.detach()
    rewards = beta * (logps - given.ref_logps)
    chosen, rejected = rewards.unbind(1)
    accuracies = (chosen > rejected).to(rewards.dtype)
    values = (loss.detach(), chosen, rejected, chosen - rejected, accuracies, *logps.unbind(1), *given.ref_logps.unbind(1))
    return {name: value.mean() for name, value in zip(PAIR_METRICS, values, strict=True)}
