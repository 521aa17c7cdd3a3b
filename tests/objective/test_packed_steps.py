"""An optimizer step whose samples are packed by tokens has the loss, the gradients and the metrics of the step that isn't.

The oracle is the definition: the mean over the step's groups of the objective of each group by itself, whole, in one micro-batch.
"""

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.batches.loader import Steps
from rwkv_dpo.batches.micro_batch import MicroBatch, collate
from rwkv_dpo.batches.samples import Samples
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.objective.losses import Mixture
from rwkv_dpo.objective.objective import PAIR_METRICS, objective
from rwkv_dpo.objective.preferences import Options
from rwkv_dpo.training.metrics import weighted_sums
from sampled import CORPUS, CTX_LEN, PAIRS, samples_of

# Sums of some hundred terms in another order, in float64: losses to their rounding; gradients are sums of terms a thousand times
# their size.
LOSS, GRADIENT = 1e-12, 1e-10
CASES = {
    "sigmoid": {}, "sft": {}, "simpo,orpo": {}, "plackett_luce,softmax,all_pairs": {}, "sigmoid,sft,plackett_luce": {},
    "ipo": {"ratio": 0.0}, "sigmoid_norm": {"ratio": 1.0}, "wpo": {}, "ld": {},
}  # fmt: skip


def mixture_of(case: str) -> Mixture:
    names = ["sigmoid", "dpop"] if case in ("wpo", "ld") else case.split(",")
    weights = {name: 1.0 + 0.5 * i for i, name in enumerate(names)}
    return Mixture(weights, Options(0.3, dpop_lambda=2.0, ld_alpha=0.5 if case == "ld" else 1.0))


def gathered(model: RWKV, batches: list[MicroBatch], mixture: Mixture, ratio: float) -> tuple[float, list[torch.Tensor]]:
    """The mean of the batches' losses, and its gradients."""
    model.zero_grad()
    losses = []
    for batch in batches:
        loss = objective(model, batch, mixture, ratio)[0] / len(batches)
        loss.backward()
        losses.append(loss.item())
    return sum(losses), [p.grad.clone() for p in model.parameters()]


def by_definition(samples: Samples, k: int, chunks: dict) -> list[MicroBatch]:
    """Each group of the step's samples, whole."""
    batches = []
    for group in range(samples.accumulated):
        own = [s for of_rank in samples.of_step(k) for call in of_rank for s in call if s.group == group]
        windows = [CORPUS.window(s.number, CTX_LEN + 1) for s in own if s.is_window and samples.corpus]
        trees = [PAIRS.tree(s.number) for s in own if not s.is_window and samples.pairs]
        numbers = [i for tree in trees for i in tree]
        ends = np.cumsum([0, *map(len, trees)])
        batches.append(collate(
            windows, [PAIRS.pair(i) for i in numbers], PAIRS.ref_logps[numbers],
            trees=[range(ends[i], ends[i + 1]) for i in range(len(trees))], scores=PAIRS.scores[numbers], **chunks,
        ))  # fmt: skip
    return batches


def assert_same(model, want, got) -> None:
    (loss, gradients), (other_loss, other_gradients) = want, got
    assert other_loss == pytest.approx(loss, rel=LOSS)
    for (name, _), a, b in zip(model.named_parameters(), gradients, other_gradients, strict=True):
        assert float((a - b).norm()) <= GRADIENT * float(a.norm()), name


def parts_of(samples: Samples, ratio: float) -> Samples:
    """With what a run of that ratio reads."""
    corpus, pairs = samples.corpus if ratio > 0 else None, samples.pairs if ratio < 1 else None
    return Samples(samples.settings, CTX_LEN, 4, samples.world_size, samples.accumulated, corpus, pairs)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("batch_tokens", [0, 70, 100_000])
@pytest.mark.parametrize("case", CASES)
def test_a_packed_step_is_the_mean_over_its_groups(tiny_shape, case, batch_tokens, world_size):
    model = random_model(tiny_shape, torch.float64)
    model.finds_collisions = case == "wpo"
    mixture, ratio = mixture_of(case), CASES[case].get("ratio", 0.4)
    samples = parts_of(samples_of(world_size, batch_tokens=batch_tokens), ratio)
    want = gathered(model, by_definition(parts_of(samples_of(world_size), ratio), 1, {}), mixture, ratio)
    batches = [batch for rank in range(world_size) for batch in Steps(samples, rank)[1]]
    assert_same(model, want, gathered(model, batches, mixture, ratio))


@pytest.mark.parametrize("tbptt", [0, 1])
def test_a_packed_step_in_chunks_is_the_same(tiny_shape, tbptt):
    """Chunks of 16 tokens, which cut windows and pairs."""
    model, mixture = random_model(tiny_shape, torch.float64), mixture_of("sigmoid,sft")
    want = gathered(model, by_definition(samples_of(1), 1, {"chunk_ctx": 16, "truncated": tbptt == 1}), mixture, 0.4)
    samples = samples_of(1, batch_tokens=90, chunk_ctx=16, tbptt=tbptt)
    assert_same(model, want, gathered(model, list(Steps(samples, 0)[1]), mixture, 0.4))
    if not tbptt:
        assert_same(model, want, gathered(model, by_definition(samples_of(1), 1, {}), mixture, 0.4))


def test_micro_batches_without_pairs_or_windows_have_the_same_metrics_and_change_no_mean(tiny_shape):
    """In calls of 30 tokens, as many as the largest tree has, a window of 24 and a tree are always apart."""
    model, mixture, means = random_model(tiny_shape, torch.float64), mixture_of("sigmoid,plackett_luce"), []
    for batch_tokens in (0, 30):
        batches = Steps(samples_of(1, batch_tokens=batch_tokens), 0)[1]
        metrics = [objective(model, batch, mixture, 0.4)[1] for batch in batches]
        assert {tuple(values) for values in metrics} == {("loss_general", *PAIR_METRICS, "loss")}
        sums = weighted_sums(batches, metrics)
        means.append(sums[:, 0] / sums[:, 1])
    assert {(batch.n_windows > 0, batch.step.n_pairs > 0) for batch in batches} == {(True, False), (False, True)}
    # Metrics are gathered in fp32, sums of a dozen terms.
    torch.testing.assert_close(means[1], means[0], rtol=1e-5, atol=1e-5)
