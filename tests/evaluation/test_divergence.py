"""The divergence of two models against torch.distributions, and the losses of windows against score_rows."""

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.batches.step import build_step
from rwkv_dpo.evaluation import divergence
from rwkv_dpo.evaluation.divergence import kl_divergence, score_windows
from rwkv_dpo.objective.objective import score_rows
from torch.distributions import Categorical
from torch.distributions.kl import kl_divergence as kl_of_distributions


def windows(n: int = 3, length: int = 12) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 61, (n, length + 1)))


def logits(model, window):
    with torch.no_grad():
        return model.head(model(build_step([window], []).forest)[0])


@pytest.mark.parametrize("batch_tokens", [1000, 5, 1])
def test_torchs_own_divergence_is_the_same(tiny_shape, batch_tokens):
    """In float64, also where a window is read in parts, from the states that both models carry on."""
    first, model = (random_model(tiny_shape, seed=seed) for seed in (0, 1))
    got = score_windows(model, windows(), batch_tokens, first).divergences
    for value, window in zip(got, windows(), strict=True):
        p, q = (Categorical(logits=logits(one, window)) for one in (model, first))
        assert value == pytest.approx(kl_of_distributions(p, q).mean().item(), rel=1e-10)
    turned = score_windows(first, windows(), batch_tokens, model).divergences
    assert np.abs(turned - got).min() > 1e-3


def test_a_model_is_no_way_from_itself(tiny_shape):
    model = random_model(tiny_shape, torch.float32)
    assert score_windows(model, windows(), 5, model).divergences.tolist() == [0, 0, 0]
    assert score_windows(model, windows(), 5).divergences.tolist() == [0, 0, 0]


@pytest.mark.parametrize("batch_tokens", [100, 24, 12, 7])
def test_losses_are_those_of_the_objective_however_many_windows_are_read_together(tiny_shape, batch_tokens):
    model, other = (random_model(tiny_shape, seed=seed) for seed in (0, 1))
    given = [*windows(5), *windows(2, length=9)]
    with torch.no_grad():
        want = [-score_rows(model, build_step([window], [])).logps.mean().item() for window in given]
    calls = []
    model.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0].tokens.numel()))
    for first in (None, other):
        assert score_windows(model, given, batch_tokens, first).losses.tolist() == pytest.approx(want, rel=1e-12)
    assert max(calls) <= batch_tokens
    assert len(calls) == 2 * {100: 2, 24: 4, 12: 7, 7: 14}[batch_tokens]


def test_slices_change_nothing_and_hold_no_more_rows_than_they_may(tiny_shape, monkeypatch):
    first, model = (random_model(tiny_shape, seed=seed) for seed in (0, 1))
    hidden, other = (torch.randn(11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    whole = kl_divergence(hidden, model.head, other, first.head)
    rows = []
    model.head.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    torch.testing.assert_close(kl_divergence(hidden, model.head, other, first.head, 4 * 61 * 4), whole, rtol=1e-12, atol=0)
    assert rows == [4, 4, 3]
    torch.testing.assert_close(kl_divergence(hidden, model.head, other, first.head, 1), whole, rtol=1e-12, atol=0)
    assert divergence.SLICE_BYTES // (4 * 65536) == 256  # rows of the World's vocabulary


def test_halves_are_computed_in_fp32(tiny_shape):
    """bf16 logits of 8 bits; the divergence of what they say is exact to fp32's 24 and the length of the sum."""
    first, model = (random_model(tiny_shape, torch.float32, seed=seed).bfloat16() for seed in (0, 1))
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        got = kl_divergence(hidden, model.head, hidden, first.head)
        p, q = (Categorical(logits=one.head(hidden).double()) for one in (model, first))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), kl_of_distributions(p, q), rtol=1e-4, atol=1e-6)
