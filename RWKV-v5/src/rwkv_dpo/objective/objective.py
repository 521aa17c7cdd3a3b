"""From windows and pairs to a loss and its metrics: one path for training, evaluation and reference scoring."""

from dataclasses import replace

import torch
from torch import Tensor

from rwkv_dpo.batches.chunks import ChunkPlan
from rwkv_dpo.batches.micro_batch import MicroBatch
from rwkv_dpo.batches.step import Step
from rwkv_dpo.kernels.linear_logprobs import LogProbs
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.objective.chunked_step import score_chunks, truncated_loss
from rwkv_dpo.objective.losses import DPOTerms, dpo_loss, is_per_pair, l2wrap, mix


def score_rows(model: RWKV, step: Step, plan: ChunkPlan | None = None) -> LogProbs:
    """Log-probabilities and largest logits of the step's scored rows: the one model call of a micro-batch, or one a chunk."""
    if plan:
        return score_chunks(model, plan)
    hidden, _ = model(step.forest)
    return model.head(hidden.index_select(0, step.scored_rows), step.targets, lean=model.is_lean)


def answer_logps(logps: Tensor, step: Step) -> Tensor:
    """Sums over the tokens of each pair's answers [pairs, 2]: chosen, rejected. fp32."""
    sums = logps.new_zeros(step.compared.n_answers)
    return sums.index_add(0, step.entry_answers, logps.index_select(0, step.entry_rows))[step.compared.pairs]


def objective(model: RWKV, batch: MicroBatch, beta: float, ratio: float, loss_name: str = "sigmoid") -> tuple[Tensor, dict[str, Tensor]]:
    """ratio * LM + (1 - ratio) * DPO of one micro-batch, and metrics under TRL's names (0-d tensors, means over the batch).

    loss_name: of DPO_LOSSES. A micro-batch without windows needs ratio 0, one without pairs ratio 1.
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
        terms = dpo_loss(logps, batch.ref_logps.to(logps.dtype), beta, batch.step.compared, loss_name)
        loss_dpo = terms.losses.mean() * (batch.pair_share if is_per_pair(loss_name) else batch.ranking_share)
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


