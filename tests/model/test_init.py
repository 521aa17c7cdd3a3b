"""Initial weights: the properties of RWKV-LM's recipe, checked by linear algebra and by hand."""

import math

import pytest
import torch
from conftest import random_model
from rwkv_dpo.model.checkpoint import empty_model
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


def blocks(version, n_layer=3):
    model = random_model(ModelShape(n_layer, 128, 128, 512, 100, head_size=64), torch.float32, version=version)
    init_weights(model, lr_init=6e-4, seed=1)
    return dict(model.named_parameters())


def singular_values(matrix):
    values = torch.linalg.svdvals(matrix)
    return values.min().item(), values.max().item()


def test_rwkv_7_begins_as_its_trainer_makes_it():
    """Values of single channels worked out by hand: layer 1 of 3 has q = 1/2 and p = 2/3, channel 64 of 128 d = 1/2."""
    weights = blocks("7")
    one = {name.removeprefix("blocks.1."): w.flatten() for name, w in weights.items() if name.startswith("blocks.1.")}
    for name, power in (("x_r", 0.2), ("x_g", 0.2), ("x_w", 0.9), ("x_a", 0.9), ("x_k", 0.7), ("x_v", 0.7)):
        assert one[f"att.{name}"][64].item() == pytest.approx(1 - 0.5 ** (power * 2 / 3))
    assert one["ffn.x_k"][64].item() == pytest.approx(1 - 0.5 ** ((2 / 3) ** 4))
    # Channel 0 and 127: z|z| is -1 and 1; 64 begins the second head.
    assert one["att.w0"][[0, 127]].tolist() == pytest.approx([-6 + 0.5 - 2.5, 0.5 + 2.5])
    assert one["att.w0"][64].item() == pytest.approx(-6 + 6 * (64 / 127) ** (1 + 0.5**0.3) + 0.5 - 2.5, rel=1e-5)
    assert one["att.a0"][[0, 127]].tolist() == pytest.approx([-0.19 - 0.3 - 0.2, -0.19 + 0.3 + 0.2])
    assert one["att.v0"][[0, 127]].tolist() == pytest.approx([0.73 + 0.2, 0.73 - 0.2])
    assert one["att.k_k"][[0, 127]].tolist() == pytest.approx([0.71 + 0.05, 0.71 - 0.05])
    assert one["att.k_a"][5].item() == pytest.approx(1.02)
    assert one["att.r_k"][5].item() == pytest.approx(-0.04)
    assert one["att.ln_x.weight"][5].item() == pytest.approx((2 / 3) ** 0.7)
    assert not any(one[f"att.{name}"].any() for name in ("w1", "a1", "v1", "g1", "output.weight"))
    assert not one["ffn.value.weight"].any()
    for name, gain in (("att.w2", 0.1), ("att.receptance.weight", 1), ("att.key.weight", 0.1), ("ffn.key.weight", 1)):
        assert singular_values(weights[f"blocks.1.{name}"]) == pytest.approx((gain, gain), rel=1e-4), name
    assert weights["emb.weight"].abs().max() <= 1e-4
    assert "blocks.0.att.v0" not in weights


def test_rwkv_6_begins_as_its_trainer_makes_it():
    weights = blocks("6")
    one = {name.removeprefix("blocks.1."): w.flatten() for name, w in weights.items() if name.startswith("blocks.1.")}
    faded = 0.5 ** (2 / 3)
    for name, value in (("x", 1 - faded), ("w", 1 - faded), ("k", 1 - faded), ("v", 1 - faded - 0.15), ("r", 1 - faded**0.5)):
        assert one[f"att.time_maa_{name}"][64].item() == pytest.approx(value)
    assert one["ffn.time_maa_k"][64].item() == pytest.approx(1 - 0.5 ** ((2 / 3) ** 3))
    assert one["att.time_decay"][[0, 127]].tolist() == pytest.approx([-6, -1])
    assert not any(one[f"att.{name}"].any() for name in ("time_maa_w1", "time_decay_w1", "output.weight"))
    assert 0.009 < one["att.time_maa_w2"].abs().max() <= 0.01
    for name, gain in (("gate", 0.1), ("key", 0.1), ("value", 1)):
        assert singular_values(weights[f"blocks.1.att.{name}.weight"]) == pytest.approx((gain, gain), rel=1e-4)


@pytest.mark.parametrize(("version", "n_embd", "ranks"), [
    ("7", 768, (64, 64, 32, 128)), ("7", 4096, (160, 160, 96, 320)), ("7", 64, (32, 32, 32, 32)), ("6", 2048, (160, 64)),
    ("6", 4096, (320, 128)), ("5", 768, ()),
])  # fmt: skip
def test_a_new_models_ranks_follow_its_width(version, n_embd, ranks):
    """Of RWKV-7 by hand: the multiple of 32 nearest to 2.5, 2.5, 1.7 and 5 times the root of n_embd, and at least 32."""
    with torch.device("meta"):
        model = empty_model(ModelShape(2, n_embd, n_embd, 96, 10, head_size=32, version=version), None, torch.float32)
    assert model.shape.ranks == ranks
