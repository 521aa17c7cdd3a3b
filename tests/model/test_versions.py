"""Every version against the inference package `rwkv` (CPU, fp32), and forests against plain sequences (float64)."""

import copy
import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.kernels.backends import choose_backend
from rwkv_dpo.model.linear import refresh_casts
from rwkv_dpo.model.shape import ModelShape
from rwkv_package import TOLERANCE, one_sequence, package_model


@pytest.fixture(params=["5", "6", "7"])
def version(request):
    return request.param


@pytest.mark.parametrize(
    "shape",
    [
        ModelShape(1, 64, 64, 96, 71, head_size=64),
        ModelShape(3, 64, 64, 224, 71, head_size=32),
        ModelShape(2, 128, 128, 448, 71, head_size=128),
        ModelShape(2, 64, 64, 224, 71, head_size=64),
    ],
    ids=lambda s: f"L{s.n_layer} D{s.n_embd} N{s.head_size}",
)
@torch.no_grad()
def test_logits_agree_with_the_rwkv_package_whole_in_chunks_token_by_token_and_packed(shape, version, tmp_path):
    model = random_model(shape, torch.float32, version=version)
    package = package_model(model, tmp_path)
    tokens = np.random.default_rng(1).integers(0, shape.vocab_size, 47).tolist()
    expected, _ = package.forward(tokens, None, full_output=True)

    whole, _ = model(one_sequence(tokens))
    torch.testing.assert_close(model.head(whole), expected, rtol=0, atol=TOLERANCE)

    for cuts in ([0, 1, 20, 20, 47], list(range(48))):
        state, pieces = None, []
        for start, end in pairwise(cuts):
            if start < end:
                hidden, state = model(one_sequence(tokens[start:end]), state)
                pieces.append(hidden)
        torch.testing.assert_close(model.head(torch.cat(pieces)), expected, rtol=0, atol=TOLERANCE)

    builder = ForestBuilder()
    builder.add(tokens[:7][::-1])
    trunk = builder.add(tokens[:30])
    rest = builder.add(tokens[30:], trunk)
    builder.add(tokens[3:9], trunk)
    forest, starts = builder.build()
    hidden, _ = model(forest)
    packed = torch.cat([hidden[starts[trunk] : starts[trunk] + 30], hidden[starts[rest] : starts[rest] + 17]])
    torch.testing.assert_close(model.head(packed), expected, rtol=0, atol=TOLERANCE)


def depth_three_forest():
    """A root with four children, one of them empty with a child of its own, and a root beside it."""
    rng = np.random.default_rng(0)
    segments, parents = [], []
    for length, parent in [(9, -1), (5, 0), (0, 0), (1, 0), (7, 0), (4, 2), (3, 1), (1, -1), (6, 5)]:
        segments.append(rng.integers(0, 61, length).tolist())
        parents.append(parent)
    return segments, parents


def test_a_forest_of_depth_three_equals_full_sequences_in_values_states_and_gradients(tiny_shape, version):
    model = random_model(tiny_shape, version=version)
    segments, parents = depth_three_forest()
    paths = []
    for tokens, parent in zip(segments, parents, strict=True):
        paths.append((paths[parent] if parent >= 0 else []) + tokens)

    builder = ForestBuilder()
    handles = [builder.add(tokens, parent) for tokens, parent in zip(segments, parents, strict=True)]
    forest, starts = builder.build()
    hidden, states = model(forest)
    weights = [torch.randn(len(tokens), hidden.shape[1], dtype=torch.float64) for tokens in segments]
    got = sum((hidden[starts[h] : starts[h] + len(w)] * w).sum() for h, w in zip(handles, weights, strict=True))
    got_grads = torch.autograd.grad(got, list(model.parameters()), allow_unused=True)

    want = torch.zeros((), dtype=torch.float64)
    for path, w in zip(paths, weights, strict=True):
        full, _ = model(one_sequence(path))
        want = want + (full[len(path) - len(w) :] * w).sum()
    want_grads = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)

    # float64 sums of a few hundred terms, in another order.
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for (name, _), g, w in zip(model.named_parameters(), got_grads, want_grads, strict=True):
        if w is None:
            assert g is None, name
        else:
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")

    places = {handle: i for i, handle in enumerate(sorted(handles, key=lambda h: depth(parents, h)))}
    for handle, path in zip(handles, paths, strict=True):
        _, ends = model(one_sequence(path))
        for layer, layer_ends in zip(states, ends, strict=True):
            for part, expected in zip(layer, layer_ends, strict=True):
                torch.testing.assert_close(part[places[handle]], expected[0], rtol=1e-9, atol=1e-9)


def depth(parents, handle):
    return 0 if parents[handle] == -1 else 1 + depth(parents, parents[handle])


def test_gradients_flow_through_a_handed_in_state(tiny_shape, version):
    model = random_model(tiny_shape, version=version)
    tokens = list(range(20))
    whole, _ = model(one_sequence(tokens))
    _, state = model(one_sequence(tokens[:8]))
    rest, _ = model(one_sequence(tokens[8:]), state)
    want = torch.autograd.grad(whole[8:].square().sum(), list(model.parameters())[:-1])
    got = torch.autograd.grad(rest.square().sum(), list(model.parameters())[:-1])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad_cp", ["1", "selective"])
def test_what_is_computed_again_changes_no_bit_of_a_gradient(tiny_shape, version, grad_cp, dtype, dropout):
    """On a forest with levels, empty segments and handed-in states; twice over one graph."""
    segments, parents = depth_three_forest()
    builder = ForestBuilder()
    for tokens, parent in zip(segments, parents, strict=True):
        builder.add(tokens, parent)
    forest, _ = builder.build()
    grads = []
    for way in ("0", grad_cp):
        weights = torch.float64 if dtype == torch.float64 else torch.float32
        model = random_model(tiny_shape, weights, version=version, grad_cp=way, dropout=dropout).train()
        model.compute_dtype = dtype
        first = ForestBuilder()
        for _ in range(forest.n_roots):
            first.add([1, 2, 3])
        torch.manual_seed(0)
        hidden, states = model(forest, model(first.build()[0])[1])
        loss = hidden.double().square().sum() + sum(state.wkv.square().sum() for state in states)
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append([p.grad for p in list(model.parameters())[:-1]])
    assert all(torch.equal(g, w) for g, w in zip(*grads, strict=True))


@pytest.mark.parametrize(("grad_cp", "n_kept"), [("0", 12.6), ("selective", 12.6), ("1", 1.3)])
def test_a_block_keeps_no_more_numbers_per_token_than_said(grad_cp, n_kept):
    """By the allocator: what two more layers allocate in a forward pass and don't give back, dim_ffn = 3.5 n_embd."""
    n_tokens, width = 500, 64
    forest = one_sequence([t % 71 for t in range(n_tokens)])

    def n_allocated(n_layer):
        shape = ModelShape(n_layer, width, width, int(3.5 * width), 71, head_size=32)
        model = random_model(shape, torch.float32, wkv=choose_backend("5", "cpu", torch.device("cpu")).wkv, grad_cp=grad_cp)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            hidden, _ = model(forest)
        assert hidden.requires_grad
        return sum(event.self_cpu_memory_usage for event in profile.key_averages()) / 4

    assert 0.9 < (n_allocated(4) - n_allocated(2)) / 2 / n_tokens / width <= n_kept


def test_a_model_that_nobody_holds_leaves_the_memory_at_once(tiny_shape, version):
    """Not when Python next looks for cycles: the next model is read by then."""
    gc.disable()
    try:
        model = random_model(tiny_shape, torch.float32, version=version)
        model.compute_dtype = torch.bfloat16
        model(one_sequence([1, 2, 3]))
        left = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        assert not any(one() is not None for one in left)
    finally:
        gc.enable()


def test_a_copy_of_a_model_computes_with_weights_of_its_own(tiny_shape, version):
    """Also with the copies of them in another dtype."""

    def narrow(model):
        model.compute_dtype = torch.bfloat16
        return model

    model, forest = narrow(random_model(tiny_shape, torch.float32, version=version)), one_sequence([1, 2, 3])
    before = model(forest)[0].clone()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.blocks.parameters():
            parameter.mul_(2)
    refresh_casts(copied)
    assert torch.equal(model(forest)[0], before)
    doubled = narrow(random_model(tiny_shape, torch.float32, version=version))
    doubled.load_state_dict(copied.state_dict())
    assert torch.equal(copied(forest)[0], doubled(forest)[0])


def test_dropout_acts_in_training_only(tiny_shape):
    model = random_model(tiny_shape, dropout=0.5)
    forest = one_sequence([1, 2, 3])
    assert torch.equal(model.eval()(forest)[0], model(forest)[0])
    assert not torch.equal(model.train()(forest)[0], model(forest)[0])


@pytest.mark.slow
@torch.no_grad()
def test_a_model_of_the_0_4b_shape_runs():
    model = random_model(ModelShape(24, 1024, 1024, 3584, 65536), torch.float32)
    hidden, states = model(one_sequence([5, 6, 7]))
    assert hidden.shape == (3, 1024)
    assert torch.isfinite(hidden).all()
    assert len(states) == 24
