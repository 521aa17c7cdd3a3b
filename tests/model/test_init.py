"""Initial weights: the properties of RWKV-LM's recipe, checked by linear algebra and by hand."""

import math

import pytest
import torch
from conftest import random_model
from rwkv_dpo.model.init import init_weights
from rwkv_dpo.model.shape import ModelShape


@pytest.fixture(scope="module")
def weights():
    model = random_model(ModelShape(3, 64, 64, 224, 100, head_size=32), torch.float32)
    init_weights(model, lr_init=6e-4, seed=1)
    return dict(model.named_parameters())


def test_what_writes_into_the_residual_stream_starts_at_zero(weights):
    for name in ("att.output.weight", "ffn.value.weight", "ffn.receptance.weight"):
        assert not weights[f"blocks.1.{name}"].any()
    assert weights["blocks.1.att.key.weight"].any()


def test_the_embedding_is_uniform_within_lr_init(weights):
    emb = weights["emb.weight"]
    assert emb.abs().max() <= 6e-4
    assert emb.std().item() == pytest.approx(6e-4 / math.sqrt(3), rel=0.03)


@pytest.mark.parametrize(("name", "gain"), [
    ("blocks.0.att.receptance.weight", 1.0), ("blocks.0.ffn.key.weight", math.sqrt(224 / 64)), ("head.weight", 0.5 * math.sqrt(100 / 64)),
])  # fmt: skip
def test_matrices_are_orthogonal_with_the_gain_of_their_shape(weights, name, gain):
    singular = torch.linalg.svdvals(weights[name])
    torch.testing.assert_close(singular, torch.full_like(singular, gain), rtol=1e-4, atol=1e-4)


def test_decays_run_from_slow_to_fast_and_mixes_follow_the_depth(weights):
    first, last = weights["blocks.0.att.time_decay"].flatten(), weights["blocks.2.att.time_decay"].flatten()
    assert first[0].item() == last[0].item() == -6
    assert first[-1].item() == last[-1].item() == -1
    assert (first[1:-1] > last[1:-1]).all()
    assert weights["blocks.0.att.time_faaaa"].flatten()[:3].tolist() == pytest.approx([0.0, 0.1, -0.1])
    assert weights["blocks.0.att.time_mix_k"].flatten()[32].item() == pytest.approx(0.5)
    assert weights["blocks.2.att.time_mix_v"].flatten()[0].item() == pytest.approx(0.3)
    assert weights["blocks.0.att.time_mix_g"].flatten()[16].item() == pytest.approx(0.5)
    assert weights["blocks.1.att.ln_x.weight"][0].item() == pytest.approx((2 / 3) ** 0.7)
    assert (weights["ln_out.weight"] == 1).all()
    assert not weights["blocks.0.ln0.bias"].any()


def test_the_same_seed_gives_the_same_weights_and_one_layer_works():
    shape = ModelShape(1, 32, 32, 96, 50, head_size=32)
    models = [random_model(shape, torch.float32, seed=i) for i in range(2)]
    for model in models:
        init_weights(model, 1e-3, seed=7)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(a).all()
