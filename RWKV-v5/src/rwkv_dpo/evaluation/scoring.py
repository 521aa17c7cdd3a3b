"""Log-probabilities, accuracy and losses of a model on pairs, through the training objective's own code."""

from collections.abc import Callable

import numpy as np
import torch

from rwkv_dpo.batches.chunks import plan_chunks
from rwkv_dpo.batches.comparisons import compare
from rwkv_dpo.batches.step import Step, build_step
from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.kernels.linear_logprobs import Scores
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.objective.losses import Mixture, preference_loss
from rwkv_dpo.objective.objective import answer_logps, pair_metrics, score_rows
from rwkv_dpo.objective.preferences import preferences


def score_pairs(
    model: RWKV, pairs: PairSet, batch_tokens: int, progress: Callable[[int], object] = lambda n: None, ld_alpha: float = 1.0
) -> np.ndarray:
    """Log-probabilities of both answers of every pair under `model`: float64 [pairs, 2], nats, each an fp32 sum; ld_alpha: as for
    objective.answer_logps.

    Pairs go through in the batches of scoring_batches; `progress` is told how many each batch held.
    """
    result = np.full((len(pairs), 2), np.nan)
    for rows in scoring_batches(pairs, batch_tokens):
        result[rows] = score_batch(model, pairs, rows, batch_tokens, ld_alpha)
        progress(len(rows))
    return result


@torch.no_grad()
def score_batch(model: RWKV, pairs: PairSet, rows: np.ndarray, batch_tokens: int, ld_alpha: float = 1.0) -> np.ndarray:
    """Log-probabilities [len(rows), 2] of both answers of those pairs, computing a shared prompt once: in one model call, or, where
    they are more than batch_tokens tokens, in chunks of so many."""
    trees: dict[bytes, list[int]] = {}
    for place, i in enumerate(rows):
        trees.setdefault(_shared(pairs, i), []).append(place)
    step = build_step([], [pairs.pair(i) for i in rows], list(trees.values()))
    logps = _score_in_parts(model, step, batch_tokens).logps
    return answer_logps(logps, step.to(logps.device), ld_alpha).double().cpu().numpy()


def _score_in_parts(model: RWKV, step: Step, batch_tokens: int) -> Scores:
    """score_rows of a step on the CPU, with no more than batch_tokens tokens at once."""
    device = model.head.weight.device
    plan = plan_chunks(step, batch_tokens).to(device) if step.forest.tokens.numel() > batch_tokens else None
    return score_rows(model, step.to(device), plan)


def scoring_batches(pairs: PairSet, batch_tokens: int) -> list[np.ndarray]:
    """Pairs that are scored together: up to batch_tokens tokens, sorted by length, pairs with the same prompt side by side (its tokens
    count once, and those of an answer that is in several). The same for the same pairs, whatever was scored before."""
    sharing: dict[bytes, list[int]] = {}
    for i in range(len(pairs)):
        sharing.setdefault(_shared(pairs, i), []).append(i)
    sizes = np.diff(pairs.offsets)
    groups: list[list[int]] = []
    lengths: list[int] = []
    for sharers in sharing.values():
        # A prompt that more pairs share than fit is computed once in each batch.
        first = sharers[0]
        computed: set[int] = set()
        for i in sharers:
            rows = set(pairs.rows[i].tolist())
            if np.array_equal(pairs.pair(i)[0], pairs.pair(first)[0]):
                rows = rows - {pairs.rows[i, 0]} | {pairs.rows[first, 0]}
            n_more = int(sizes[list(rows - computed)].sum())
            if i == first or lengths[-1] + n_more > batch_tokens:
                groups.append([])
                lengths.append(0)
                n_more, computed = int(sizes[list(rows)].sum()), set()
            groups[-1].append(i)
            lengths[-1] += n_more
            computed |= rows
    batches = token_batches(np.argsort(lengths, kind="stable"), np.array(lengths), batch_tokens)
    return [np.concatenate([groups[i] for i in batch]) for batch in batches]


def prompt_numbers(pairs: PairSet) -> np.ndarray:
    """int64 [pairs], from 0 on: the same for pairs of one tree, and of trees that begin with the same prompt."""
    numbers: dict[bytes, int] = {}
    of_trees = [numbers.setdefault(_shared(pairs, first), len(numbers)) for first in pairs.trees[:-1]]
    return np.repeat(of_trees, np.diff(pairs.trees))


def _shared(pairs: PairSet, i: int) -> bytes:
    """What pairs that are computed together have in common: the first prompt of their tree."""
    return pairs.pair(pairs.trees[pairs.tree_of(i)])[0].tobytes()


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


def evaluate_pairs(
    model: RWKV, pairs: PairSet, mixture: Mixture, batch_tokens: int, progress: Callable[[int], object] = lambda n: None
) -> dict[str, float]:
    """pair_means of what the model makes of the pairs. `progress` is told how many pairs each batch held."""
    return pair_means(score_pairs(model, pairs, batch_tokens, progress, mixture.options.ld_alpha), pairs, mixture)


def pair_means(scores: np.ndarray, pairs: PairSet, mixture: Mixture) -> dict[str, float]:
    """Means over all pairs (of losses of rankings, over all rankings) of score_pairs' log-probabilities, under the names of metrics.jsonl;
    logps/accuracies: the share of pairs whose chosen answer is the more probable one, reference aside; lengths/preferred: tokens
    of the answers with the higher reward. Of pairs that are not scored only what needs no reference."""
    logps = torch.from_numpy(scores)
    refs = torch.from_numpy(pairs.ref_logps)
    trees = [pairs.tree(t) for t in range(pairs.n_trees)]
    compared, _ = compare([pairs.pair(i) for i in range(len(pairs))], trees, pairs.scores)
    given = preferences(logps, refs, compared)
    loss = preference_loss(given, mixture)
    metrics = {name: float(value) for name, value in pair_metrics(given, loss, mixture.options.beta).items()}
    if not pairs.is_scored and mixture.uses_reference:
        metrics = {name: value for name, value in metrics.items() if name.startswith("logps/")}
    gains = given.ratios
    preferred = torch.where(gains[:, 0] >= gains[:, 1], given.lengths[:, 0], given.lengths[:, 1])
    lengths = {"chosen": given.lengths[:, 0], "rejected": given.lengths[:, 1], "preferred": preferred}
    metrics |= {f"lengths/{name}": float(n.double().mean()) for name, n in lengths.items()}
    return {**metrics, "logps/accuracies": float((logps[:, 0] > logps[:, 1]).double().mean())}
