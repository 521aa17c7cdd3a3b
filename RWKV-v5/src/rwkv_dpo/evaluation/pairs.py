"""Preference accuracy, loss and margins of a model on a set of pairs, through the training objective's own code."""

from collections.abc import Callable

import torch

from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.losses import dpo_loss
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.objective import pair_metrics, score_pairs


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
