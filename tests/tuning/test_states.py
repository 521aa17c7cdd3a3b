"""Tuned first states: against states handed in, against full sequences, and through the `rwkv` package."""

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.batches.forest import ForestBuilder, LayerState
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.tuning.states import add_states, read_states
from rwkv_dpo.tuning.tuning import load_tuned
from rwkv_package import TOLERANCE, one_sequence, package_model


def tuned(shape, dtype=torch.float64, **options):
    """A model whose states have moved, each entry on its own, so that a transposed axis shows."""
    model = random_model(shape, dtype, **options)
    add_states(model)
    model.to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in states(model).values():
            p.normal_(0, 1, generator=generator)
    return model


def states(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("grad_cp", ["0", "1"])
def test_the_zero_state_is_the_plain_model(tiny_shape, grad_cp):
    plain, model = random_model(tiny_shape), random_model(tiny_shape, grad_cp=grad_cp)
    add_states(model)
    assert set(states(model)) == {f"blocks.{i}.att.time_state" for i in range(tiny_shape.n_layer)}
    assert torch.equal(model(one_sequence([1, 2, 3]))[0], plain(one_sequence([1, 2, 3]))[0])


@pytest.mark.parametrize("grad_cp", ["0", "1"])
def test_roots_begin_from_the_states_and_children_from_their_parents(tiny_shape, grad_cp):
    model, plain = tuned(tiny_shape, grad_cp=grad_cp), random_model(tiny_shape)
    builder = ForestBuilder()
    trunk = builder.add([5, 6, 7])
    builder.add([8, 9], trunk)
    builder.add([10], trunk)
    builder.add([11, 12])
    forest, starts = builder.build()
    hidden, _ = model(forest)
    got = torch.autograd.grad(hidden.square().sum(), list(states(model).values()))

    handed = [p.detach().transpose(1, 2).clone().requires_grad_() for p in states(model).values()]
    zero = torch.zeros(1, tiny_shape.n_embd, dtype=torch.float64)
    initial = [LayerState(zero, state[None], zero) for state in handed]
    loss = torch.zeros((), dtype=torch.float64)
    for i, (path, n) in enumerate([([5, 6, 7], 3), ([5, 6, 7, 8, 9], 2), ([5, 6, 7, 10], 1), ([11, 12], 2)]):
        full, _ = plain(one_sequence(path), initial)
        torch.testing.assert_close(hidden[starts[i] : starts[i] + n], full[-n:], rtol=1e-9, atol=1e-9)
        loss = loss + full[-n:].square().sum()
    want = torch.autograd.grad(loss, handed)
    for g, w in zip(got, want, strict=True):
        assert w.any()
        torch.testing.assert_close(g.transpose(1, 2), w, rtol=1e-9, atol=1e-9)


def test_a_state_that_is_handed_in_takes_their_place(tiny_shape):
    model, plain = tuned(tiny_shape), random_model(tiny_shape)
    _, state = plain(one_sequence([1, 2, 3]))
    assert torch.equal(model(one_sequence([4, 5]), state)[0], plain(one_sequence([4, 5]), state)[0])


@pytest.mark.parametrize("version", ["5", "6", "7"])
@pytest.mark.parametrize("head_size", [32, 64])
@torch.no_grad()
def test_a_state_file_gives_the_same_logits_in_the_rwkv_package(tmp_path, head_size, version):
    shape = ModelShape(2, 64, 64, 224, 71, head_size=head_size)
    model = tuned(shape, torch.float32, version=version)
    add_states(random_model(shape, torch.float32, version=version)).save(states(model), tmp_path, "final")
    tokens = np.random.default_rng(1).integers(0, shape.vocab_size, 19).tolist()
    want = model.head(model(one_sequence(tokens))[0])

    package = package_model(random_model(shape, torch.float32, version=version), tmp_path)
    file = torch.load(tmp_path / "state-final.pth", weights_only=True)
    # As RWKV-Runner and the package itself put such a file into a state: shifts zero, the last two axes swapped but for RWKV-7.
    first = []
    for layer in range(shape.n_layer):
        state = file[f"blocks.{layer}.att.time_state"]
        first += [torch.zeros(64), state.clone() if version == "7" else state.transpose(1, 2).contiguous(), torch.zeros(64)]
    got, _ = package.forward(tokens, first, full_output=True)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)
    plain, _ = package.forward(tokens, None, full_output=True)
    assert (plain - want).abs().max() > 100 * TOLERANCE

    loaded = load_tuned(random_model(shape, torch.float32, version=version), tmp_path / "state-final.pth")
    assert torch.equal(loaded.head(loaded(one_sequence(tokens))[0]), want)


@torch.no_grad()
def test_the_rwkv_package_reads_states_that_stand_in_a_checkpoint(tmp_path):
    shape = ModelShape(2, 64, 64, 224, 71, head_size=32)
    model = tuned(shape, torch.float32)
    package = package_model(model, tmp_path)
    want = model.head(model(one_sequence([3, 1, 2]))[0])
    torch.testing.assert_close(package.forward([3, 1, 2], None, full_output=True)[0], want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("edit", "message"), [
    (lambda s: s.pop("blocks.1.att.time_state"), r"of another model: blocks.1.att.time_state is missing, this model has \(4, 8, 8\)"),
    (lambda s: s.update({"blocks.2.att.time_state": torch.zeros(4, 8, 8)}), r"blocks.2.att.time_state is \(4, 8, 8\), this model has no"),
    (lambda s: s.update({"blocks.0.att.time_state": torch.zeros(2, 16, 16)}), r"blocks.0.att.time_state is \(2, 16, 16\), this model has"),
    (lambda s: s.update({"emb.weight": torch.zeros(2)}), "not a state file"),
])  # fmt: skip
def test_states_of_another_model_are_refused(tiny_shape, tmp_path, edit, message):
    model = tuned(tiny_shape, torch.float32)
    weights = {name: p.detach() for name, p in states(model).items()}
    edit(weights)
    save_weights(weights, tmp_path / "s.pth")
    with pytest.raises(InputError, match=message) as error:
        read_states(tmp_path / "s.pth", random_model(tiny_shape, torch.float32))
    assert "s.pth" in str(error.value)
