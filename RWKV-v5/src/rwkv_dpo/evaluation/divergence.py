"""Windows of a corpus: a model's loss, and how far its distribution over the vocabulary is from another model's."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_dpo.batches.forest import ForestBuilder, LayerState
from rwkv_dpo.model.rwkv import RWKV, Head

# Of one [rows, vocabulary] tensor of fp32 logits; three of them live at a time.
SLICE_BYTES = 64 << 20
# exp overflows beyond 709.
_LARGEST_LOG = 700


class WindowScores(NamedTuple):
    """Means over the tokens of each window, float64 [windows], nats per token."""

    losses: np.ndarray  # negative log-likelihood of the next token
    divergences: np.ndarray  # KL(model || first), 0 without a first model


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; infinite where it is no number of a computer."""
    return math.exp(loss) if loss <= _LARGEST_LOG else math.inf


@torch.no_grad()
def score_windows(model: RWKV, windows: Iterable[np.ndarray], batch_tokens: int, first: RWKV | None = None) -> WindowScores:
    """Of windows of [T + 1] token ids, batch_tokens tokens at once: several windows, or a part of one. first: the model to measure the
    divergence from, of the same vocabulary and on the same device; both are in memory, and each reads every window."""
    scores, waiting = [np.zeros((0, 2))], list[np.ndarray]()
    for window in windows:
        if waiting and (len(window) != len(waiting[0]) or (len(waiting) + 1) * (len(window) - 1) > batch_tokens):
            scores.append(_score_together(model, np.stack(waiting), batch_tokens, first))
            waiting = []
        waiting.append(window)
    if waiting:
        scores.append(_score_together(model, np.stack(waiting), batch_tokens, first))
    return WindowScores(*np.concatenate(scores).T)


def _score_together(model: RWKV, windows: np.ndarray, batch_tokens: int, first: RWKV | None) -> np.ndarray:
    """float64 [n, 2]: losses and divergences of windows [n, T + 1], that are more than batch_tokens tokens only where there is one."""
    n, length = len(windows), windows.shape[1] - 1
    sums = torch.zeros(n, 2, dtype=torch.float64)
    states: list[LayerState] | None = None
    first_states: list[LayerState] | None = None
    for start in range(0, length, batch_tokens):
        end = min(start + batch_tokens, length)
        builder = ForestBuilder()
        for window in windows:
            builder.add(window[start:end])
        forest = builder.build()[0].to(model.head.weight.device)  # as long as one another, roots come in their order
        targets = torch.from_numpy(windows[:, start + 1 : end + 1].reshape(-1)).to(forest.tokens.device)
        hidden, states = model(forest, states)
        sums[:, 0] -= model.head(hidden, targets).logps.double().view(n, -1).sum(1).cpu()
        if first is not None:
            other, first_states = first(forest, first_states)
            sums[:, 1] += kl_divergence(hidden, model.head, other, first.head).double().view(n, -1).sum(1).cpu()
    return (sums / length).numpy()


@torch.no_grad()
def kl_divergence(hidden: Tensor, head: Head, other: Tensor, other_head: Head, slice_bytes: int = SLICE_BYTES) -> Tensor:
    """sum_v p(v) (log p(v) - log q(v)) of each row [R], over the whole vocabulary, in nats: p the distribution that `head` makes of
    hidden [R, C], q that of the other head and rows. fp32 (float64 of float64), as many rows at once as have logits of slice_bytes."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    n_rows = max(1, slice_bytes // (4 * head.weight.shape[0]))
    result = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    for part, rows, other_rows in zip(result.split(n_rows), hidden.split(n_rows), other.split(n_rows), strict=True):
        log_p = torch.log_softmax(head(rows), dim=1, dtype=wide)
        log_q = torch.log_softmax(other_head(other_rows), dim=1, dtype=wide)
        differences = log_q.neg_().add_(log_p)
        # A product of rows, without another tensor of their size.
        part.copy_(torch.einsum("rv,rv->r", log_p.exp_(), differences))
        del log_p, log_q, differences  # before the next slice's logits
    return result
