"""Trees as samples: equal, in float64, to their pairs one by one, at a fraction of the tokens."""

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.batches.micro_batch import collate
from rwkv_dpo.batches.step import build_step
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.data.trees import grow
from rwkv_dpo.evaluation.scoring import evaluate_pairs, score_pairs
from rwkv_dpo.objective.losses import LOSSES, Mixture, dpo
from rwkv_dpo.objective.objective import objective
from rwkv_dpo.objective.preferences import Options
from test_objective import full_forward_loss

RNG = np.random.default_rng(0)


def tokens(n):
    return RNG.integers(0, 61, n)


def all_pairs(prompt, answers):
    return [(prompt, answers[i], answers[j]) for i in range(len(answers)) for j in range(i + 1, len(answers))]


TURN, ANSWER = tokens(9), tokens(6)
# Four answers, two of which begin alike; a dialogue that goes on after its first answer, and after the other one; a pair by itself.
PAIRS = [
    *all_pairs(tokens(7), [tokens(5), np.array([1, 2, 3]), np.array([1, 2, 9, 9]), tokens(1)]),
    (TURN, ANSWER, np.array([5, 7])),
    (np.concatenate([TURN, ANSWER, [60, 4]]), tokens(3), tokens(4)),
    (np.concatenate([TURN, [5, 60, 4]]), tokens(2), tokens(5)),
    (tokens(4), tokens(3), tokens(2)),
]
SCORES = np.array([[4, 3], [4, 2], [4, 1], [3, 2], [3, 1], [2, 1], [9, 1], [np.nan, np.nan], [2, 1], [0.5, 0]])
WINDOWS = [tokens(13), tokens(21)]


def mixture(loss):
    return Mixture({loss: 1.0}, Options(0.3, label_smoothing=0.1))


@pytest.fixture(scope="module")
def grown():
    refs = -10 * RNG.random((len(PAIRS), 2))
    # An answer that is in several pairs has one reference log-probability.
    of_answer = {}
    for i, (prompt, *answers) in enumerate(PAIRS):
        for side, answer in enumerate(answers):
            refs[i, side] = of_answer.setdefault((prompt.tobytes(), answer.tobytes()), refs[i, side])
    return grow(pack_pairs(PAIRS, np.float32(refs), scores=SCORES), tree_tokens=1000).pairs


def batch_of(pairs, windows=(), chunk_ctx=0, trees=True):
    rows = [pairs.tree(t) for t in range(pairs.n_trees)] if trees else None
    return collate(windows, [pairs.pair(i) for i in range(len(pairs))], pairs.ref_logps, chunk_ctx, trees=rows, scores=pairs.scores)


def assert_same_gradients(got, want, model, tolerance=1e-9):
    assert got.item() == pytest.approx(want.item(), rel=tolerance)
    both = (torch.autograd.grad(loss, list(model.parameters())) for loss in (got, want))
    for (name, _), g, w in zip(model.named_parameters(), *both, strict=True):
        assert (g - w).norm() <= tolerance * w.norm() + 1e-15, name


def test_the_trees_are_those_that_were_meant(grown):
    assert [len(grown.tree(t)) for t in range(grown.n_trees)] == [6, 3, 1]


@pytest.mark.parametrize("chunk_ctx", [0, 16])
def test_trees_are_worth_two_full_forwards_a_pair(tiny_shape, grown, chunk_ctx):
    model = random_model(tiny_shape)
    pairs = [grown.pair(i) for i in range(len(grown))]
    want = full_forward_loss(model, WINDOWS, pairs, grown.ref_logps, beta=0.3, ratio=0.7)
    got, _ = objective(model, batch_of(grown, WINDOWS, chunk_ctx), dpo(0.3), ratio=0.7)
    assert_same_gradients(got, want, model)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_the_same_in_chunks_and_of_trees_that_share_nothing(tiny_shape, grown, loss):
    model = random_model(tiny_shape)
    want, _ = objective(model, batch_of(grown), mixture(loss), 0.0)
    got, _ = objective(model, batch_of(grown, chunk_ctx=16), mixture(loss), 0.0)
    assert_same_gradients(got, want, model)
    if loss == "sigmoid":
        alone, _ = objective(model, batch_of(grown, trees=False), mixture(loss), 0.0)
        want, _ = objective(model, batch_of(grown), mixture(loss), 0.0)
        assert_same_gradients(alone, want, model)


def test_prompts_and_answers_are_computed_once_however_many_pairs_they_are_in(grown):
    answers = {(p.tobytes(), a.tobytes()): (p, a) for p, *both in PAIRS for a in both}.values()
    inputs = {tuple((*p, *a)[:n]) for p, a in answers for n in range(1, len(p) + len(a))}
    step = batch_of(grown).step
    assert step.forest.tokens.numel() == len(inputs)
    scored = {(tuple((*p, *a)[: len(p) + i]), a[i]) for p, a in answers for i in range(len(a))}
    assert step.scored_rows.numel() == len(scored)
    assert build_step([], PAIRS).forest.tokens.numel() > 1.5 * len(inputs)


@pytest.mark.parametrize("batch_tokens", [8, 40, 1000])
def test_scores_of_trees_are_those_of_their_pairs(tiny_shape, grown, batch_tokens):
    model = random_model(tiny_shape)
    want = score_pairs(model, pack_pairs([grown.pair(i) for i in range(len(grown))]), 1)
    assert score_pairs(model, grown, batch_tokens) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_held_out_trees_are_measured_by_the_loss_of_training(tiny_shape, grown, loss):
    model = random_model(tiny_shape)
    want, metrics = objective(model, batch_of(grown), mixture(loss), 0.0)
    got = evaluate_pairs(model, grown, mixture(loss), 100)
    assert got["loss_dpo"] == pytest.approx(want.item(), rel=1e-6)  # weights are fp32
    assert got["rewards/margins"] == pytest.approx(metrics["rewards/margins"].item(), rel=1e-9)
