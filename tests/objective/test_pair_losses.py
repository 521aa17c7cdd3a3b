"""Losses of pairs: by hand from their equations, against what TRL computes, and their gradients through a model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.batches.comparisons import compare
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.batches.micro_batch import collate
from rwkv_dpo.kernels.linear_logprobs import LogProbsAndCollisions
from rwkv_dpo.objective.losses import LOSSES, Mixture, dpo, mixture_of, mixture_of_flags, preference_loss
from rwkv_dpo.objective.objective import answer_logps, objective, pair_weights
from rwkv_dpo.objective.preferences import Options, preferences
from rwkv_dpo.objective.settings import LOSSES_OF_PAIRS, WITHOUT_REFERENCE, ObjectiveSettings

# What trl_losses.py made of TRL.
TRL = json.loads((Path(__file__).parent / "trl_losses.json").read_text())
LN2 = math.log(2)


def preferences_of(logps, ref_logps, lengths, dtype=torch.float64):
    """Of pairs whose answers have these lengths [P][2]."""
    pairs = [(np.array([i]), np.full(chosen, 1), np.full(rejected, 2)) for i, (chosen, rejected) in enumerate(lengths)]
    return preferences(torch.tensor(logps, dtype=dtype), torch.tensor(ref_logps, dtype=dtype), compare(pairs)[0])


def value(name, logps, refs, lengths=((2, 4),), **options):
    return LOSSES[name](preferences_of([logps], [refs], lengths), Options(**{"beta": 0.1, **options})).item()


def s(x):
    return 1 / (1 + math.exp(-x))


# Log-ratios x = 2 and y = -5: beta 0.1 makes rewards of 0.2 and -0.5, and a margin of 0.7. The answers have 2 and 4 tokens.
BY_HAND = {
    "sigmoid": -math.log(s(0.7)),
    "cdpo": -0.9 * math.log(s(0.7)) - 0.1 * math.log(s(-0.7)),
    "robust": (-0.9 * math.log(s(0.7)) + 0.1 * math.log(s(-0.7))) / 0.8,
    "hinge": 0.3,
    "ipo": (2 / 2 + 5 / 4 - 5) ** 2,
    "sigmoid_norm": -math.log(s(0.1 * (2 / 2 + 5 / 4))),
    "exo_pair": s(0.7) * math.log(s(0.7) / 0.9) + s(-0.7) * math.log(s(-0.7) / 0.1),
    "nca_pair": -math.log(s(0.2)) - 0.5 * math.log(s(-0.2)) - 0.5 * math.log(s(0.5)),
    "bco_pair": -math.log(s(0.2)) - math.log(s(0.5)),
    "sppo_hard": (2 - 5) ** 2 + (-5 + 5) ** 2,
    "apo_zero": 1 - s(0.2) + s(-0.5),
    "apo_down": s(0.2) + 1 - s(0.7),
    "discopop": (1 - s(14)) * -math.log(s(0.7)) + s(14) * math.exp(-0.7),
    "dpop": -math.log(s(0.7)),
    "simpo": -math.log(s(0.1 * (-10 / 2 + 20 / 4) - 0.5)),
    "orpo": 5 + 0.1 * LN2,
    "sft": 5.0,
    "aot": -0.9 * math.log(s(0.7)) - 0.1 * math.log(s(-0.7)),
    "aot_unpaired": -0.9 * math.log(s(0.7)) - 0.1 * math.log(s(-0.7)),
}


@pytest.mark.parametrize("name", LOSSES_OF_PAIRS)
def test_a_pair_by_hand(name):
    assert value(name, (-10, -20), (-12, -15), label_smoothing=0.1) == pytest.approx(BY_HAND[name], rel=1e-12)


def test_a_chosen_answer_that_becomes_less_likely_costs_extra_by_hand():
    # x = -1, y = -4: 0.1 * (3 - 50 * 1) = -4.7
    assert value("dpop", (-11, -14), (-10, -10)) == pytest.approx(-math.log(s(-4.7)), rel=1e-12)
    assert value("dpop", (-11, -14), (-10, -10), dpop_lambda=0.0) == value("sigmoid", (-11, -14), (-10, -10))


def test_odds_by_hand():
    # Probabilities of 1/2 and 1/4 a token: odds of 1 and 1/3.
    logps = (2 * math.log(0.5), 4 * math.log(0.25))
    assert value("orpo", logps, (0, 0)) == pytest.approx(LN2 - 0.1 * math.log(s(math.log(3))), rel=1e-12)
    # A probability that rounds to 1 has odds, and a gradient.
    likely = torch.tensor([[-1e-12, -3.0]], dtype=torch.float64, requires_grad=True)
    compared = preferences_of([[0, 0]], [[0, 0]], [(2, 4)]).compared
    LOSSES["orpo"](preferences(likely, torch.zeros(1, 2), compared), Options(0.1)).sum().backward()
    assert torch.isfinite(likely.grad).all()


def test_losses_over_a_batch_by_hand():
    """Differences of 1 and 5 under the policy and of 4 and 0 under the reference: sorted, 1 - 0 and 5 - 4."""
    given = preferences_of([[-1, -2], [-3, -8]], [[-2, -6], [-3, -3]], [(1, 2), (5, 5)])
    assert LOSSES["aot"](given, Options(0.5)).tolist() == pytest.approx([-math.log(s(0.5))] * 2, rel=1e-12)
    # Log-ratios 1 and 0 of chosen, 4 and -5 of rejected answers: sorted, 0 + 5 and 1 - 4.
    assert LOSSES["aot_unpaired"](given, Options(0.5)).tolist() == pytest.approx([-math.log(s(2.5)), -math.log(s(-1.5))], rel=1e-12)
    assert LOSSES["sft"](given, Options(0.5)).mean().item() == pytest.approx((1 + 3) / (1 + 5), rel=1e-12)


DIVERGENCES = {
    "reverse_kl": (2, -5), "forward_kl": (1 - math.exp(-2), 1 - math.exp(5)), "js": (LN2 + math.log(s(2)), LN2 + math.log(s(-5))),
    "alpha": ((math.exp(-1.0) - 1) / -0.5, (math.exp(2.5) - 1) / -0.5),
}  # fmt: skip


@pytest.mark.parametrize(("name", "scores"), DIVERGENCES.items())
def test_divergences_by_hand(name, scores):
    got = value("hinge", (-10, -20), (-12, -15), f_divergence=name, beta=1e-3)
    assert got == pytest.approx(1 - 1e-3 * (scores[0] - scores[1]), rel=1e-12)


@given(st.floats(-20, 20), st.floats(-20, 20))
def test_alpha_1_is_the_reverse_kl_and_0_the_forward(x, y):
    for alpha, name in ((1.0, "reverse_kl"), (1 + 1e-9, "reverse_kl"), (0.0, "forward_kl")):
        got = value("hinge", (x, y), (0, 0), beta=1e-9, f_divergence="alpha", f_alpha=alpha)
        assert got == pytest.approx(value("hinge", (x, y), (0, 0), beta=1e-9, f_divergence=name), rel=1e-6)


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda case: case["name"])
def test_values_and_gradients_are_those_of_trl(case):
    logps = torch.tensor(TRL["logps"], dtype=torch.float32, requires_grad=True)
    compared = preferences_of(TRL["logps"], TRL["ref_logps"], TRL["lengths"]).compared
    given = preferences(logps, torch.tensor(TRL["ref_logps"]), compared)
    mixture = Mixture(dict(zip(case["losses"], case["weights"], strict=True)), Options(**case["options"]))
    loss = preference_loss(given, mixture)
    loss.backward()
    # TRL's are fp32 too.
    assert loss.item() == pytest.approx(case["loss"], rel=2e-5)
    torch.testing.assert_close(logps.grad, torch.tensor(case["gradient"]), rtol=2e-4, atol=1e-6)


def test_every_loss_that_trl_has_is_compared():
    assert {name for case in TRL["cases"] for name in case["losses"]} == set(TRL["losses"])
    assert set(TRL["losses"]) <= set(LOSSES_OF_PAIRS)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1.0, 300.0, 1e5])
def test_gradients_are_finite_and_right(name, size):
    given = preferences_of([[-3.1, -4.2], [-9.0, -2.5], [-1.3, -1.1]], [[-3.0, -4.9], [-7.0, -3.0], [-2.0, -0.5]], [(2, 4), (5, 3), (1, 1)])
    logps = (given.logps * size).requires_grad_()
    options = Options(0.3, label_smoothing=0.1)

    def loss(values):
        return LOSSES[name](given._replace(logps=values), options).mean()

    (gradient,) = torch.autograd.grad(loss(logps), logps)
    assert torch.isfinite(gradient).all()
    if size == 1:
        assert torch.autograd.gradcheck(loss, logps)


PAIRS = [([5, 6, 7, 8], [9, 10, 11], [12]), ([1], [2], [3]), ([4, 4, 4], [7, 7, 1, 2], [7, 7, 3]), ([30, 31], [8, 9], [8, 9, 10, 11])]


@pytest.mark.parametrize("chunk_ctx", [0, 16])
@pytest.mark.parametrize("name", LOSSES)
def test_through_the_forest_a_loss_has_the_gradient_of_two_full_forwards(tiny_shape, name, chunk_ctx):
    model = random_model(tiny_shape)
    pairs = [tuple(map(np.array, pair)) for pair in PAIRS]
    refs = np.array([[-3.0, -5.0], [-1.0, -4.0], [-9.0, -2.0], [-3.0, -3.5]])
    mixture = Mixture({name: 1.0}, Options(0.3, label_smoothing=0.1))

    def full_forward(prompt, answer):
        builder = ForestBuilder()
        builder.add(np.concatenate([prompt, answer])[:-1])
        logps = torch.log_softmax(model.head(model(builder.build()[0])[0]), 1)[len(prompt) - 1 :]
        return logps.gather(1, torch.as_tensor(answer)[:, None]).sum()

    logps = torch.stack([torch.stack([full_forward(prompt, answer) for answer in both]) for prompt, *both in pairs])
    want = preference_loss(preferences(logps, torch.from_numpy(refs), compare(pairs)[0]), mixture)
    got, metrics = objective(model, collate([], pairs, refs, chunk_ctx), mixture, 0.0)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    assert metrics["loss_dpo"].item() == got.item()
    both = (torch.autograd.grad(loss, list(model.parameters())) for loss in (got, want))
    for (parameter, _), g, w in zip(model.named_parameters(), *both, strict=True):
        assert (g - w).norm() <= 1e-9 * w.norm() + 1e-15, parameter


def test_a_mixture_is_the_weighted_sum():
    given = preferences_of([[-10, -20]], [[-12, -15]], [(2, 4)])
    mixture = mixture_of(ObjectiveSettings(dpo_loss="sigmoid, sft", dpo_loss_weights="1,0.25", dpo_beta=0.1))
    assert preference_loss(given, mixture).item() == pytest.approx(BY_HAND["sigmoid"] + 0.25 * BY_HAND["sft"], rel=1e-12)
    assert mixture_of_flags({"dpo_beta": 0.3, "n_layer": 2}) == dpo(0.3)


def test_losses_without_a_reference_do_not_depend_on_it():
    for name in LOSSES:
        unknown = value(name, (-10, -20), (math.nan, math.nan), label_smoothing=0.1)
        other = value(name, (-10, -20), (-3, -7), label_smoothing=0.1)
        assert (unknown == other) == (name in WITHOUT_REFERENCE), name


@pytest.mark.parametrize("case", TRL["tokens"]["cases"], ids=lambda case: str(case["options"]) + "+".join(case["losses"]))
def test_what_depends_on_tokens_is_as_in_trl(case):
    """LD-DPO and WPO."""
    lengths = TRL["lengths"]
    pairs = [(np.array([i]), np.full(chosen, 1), np.full(rejected, 2)) for i, (chosen, rejected) in enumerate(lengths)]
    batch = collate([], pairs, np.array(TRL["ref_logps"]))
    # TRL has all chosen answers first, and we have each pair's answers one after the other.
    ours = [(side * len(pairs) + i, token) for i, both in enumerate(lengths) for side, n in enumerate(both) for token in range(n)]
    tokens = torch.tensor(TRL["tokens"]["logps"], requires_grad=True)
    assert len(ours) == len(batch.step.targets)
    logps, collisions = (torch.stack([values[place] for place in ours]) for values in (tokens, torch.tensor(TRL["tokens"]["collisions"])))
    rows = LogProbsAndCollisions(logps, torch.zeros_like(logps), collisions)
    options = {name: value for name, value in case["options"].items() if name != "wpo"}
    given = preferences(answer_logps(logps, batch.step, options.get("ld_alpha", 1.0)), batch.ref_logps, batch.step.compared)
    if "wpo" in case["options"]:
        given = given._replace(weights=pair_weights(rows, batch.step))
    loss = preference_loss(given, Mixture(dict(zip(case["losses"], case["weights"], strict=True)), Options(**options)))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=2e-5)
    torch.testing.assert_close(tokens.grad, torch.tensor(case["gradient"]), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_ctx", [0, 16])
@pytest.mark.parametrize("wpo", [False, True])
@pytest.mark.parametrize("ld_alpha", [1.0, 0.25, 0.0])
def test_through_the_forest_tokens_count_as_in_two_full_forwards(tiny_shape, ld_alpha, wpo, chunk_ctx):
    model = random_model(tiny_shape)
    # An answer that stands in two pairs, beside partners of other lengths.
    pairs = [tuple(map(np.array, pair)) for pair in [*PAIRS, ([4, 4, 4], [7, 7, 1, 2], [5, 5])]]
    refs = np.array([[-3.0, -5.0], [-1.0, -4.0], [-9.0, -2.0], [-3.0, -3.5], [-9.5, -2.0]])
    mixture = Mixture({"sigmoid": 1.0, "hinge": 0.5}, Options(0.3, ld_alpha=ld_alpha))

    def full_forward(prompt, answer):
        builder = ForestBuilder()
        builder.add(np.concatenate([prompt, answer])[:-1])
        logps = torch.log_softmax(model.head(model(builder.build()[0])[0]), 1)[len(prompt) - 1 :]
        return logps.gather(1, torch.as_tensor(answer)[:, None])[:, 0], torch.logsumexp(2 * logps, 1)

    def of_pair(prompt, *answers):
        (chosen, rejected), n = (full_forward(prompt, answer) for answer in answers), min(map(len, answers))
        sums = torch.stack([logps[:n].sum() + ld_alpha * logps[n:].sum() for logps, _ in (chosen, rejected)])
        return sums, math.exp(sum((logps - squares).mean().item() for logps, squares in (chosen, rejected)))

    sums, weights = zip(*(of_pair(*pair) for pair in pairs), strict=True)
    given = preferences(torch.stack(sums), torch.from_numpy(refs), compare(pairs)[0])
    want = preference_loss(given._replace(weights=torch.tensor(weights, dtype=torch.float64) if wpo else None), mixture)
    model.finds_collisions = wpo
    trees = [[0], [1], [2, 4], [3]]
    got, _ = objective(model, collate([], pairs, refs, chunk_ctx, trees=trees), mixture, 0.0)
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    both = (torch.autograd.grad(loss, list(model.parameters())) for loss in (got, want))
    for (parameter, _), g, w in zip(model.named_parameters(), *both, strict=True):
        assert (g - w).norm() <= 1e-9 * w.norm() + 1e-15, parameter
