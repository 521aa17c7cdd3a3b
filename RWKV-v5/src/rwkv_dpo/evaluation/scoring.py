"""Log-probabilities, accuracy and losses of a model on pairs and text, through the training objective's own code."""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from rwkv_dpo.batches.chunks import plan_chunks
from rwkv_dpo.batches.step import Step, build_step
from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.kernels.linear_logprobs import LogProbs
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.objective.losses import dpo_loss
from rwkv_dpo.objective.objective import answer_logps, pair_metrics, score_rows


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


def evaluate_pairs(
    model: RWKV, pairs: PairSet, beta: float, batch_tokens: int, progress: Callable[[int], object] = lambda n: None
) -> dict[str, float]:
    """Means over all pairs, under the names of metrics.jsonl; logps/accuracies: the share of pairs whose chosen answer is the more
    probable one, reference aside. Of pairs that are not scored only what needs no reference. `progress` is told how many pairs each
    batch held."""
    logps = torch.from_numpy(score_pairs(model, pairs, batch_tokens, progress))
    refs = torch.from_numpy(pairs.ref_logps)
    metrics = {name: float(value) for name, value in pair_metrics(logps, refs, dpo_loss(logps, refs, beta)).items()}
    if not pairs.is_scored:
        metrics = {name: value for name, value in metrics.items() if name.startswith("logps/")}
    return {**metrics, "logps/accuracies": float((logps[:, 0] > logps[:, 1]).double().mean())}
