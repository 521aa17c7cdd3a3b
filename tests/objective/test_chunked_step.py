"""Chunked steps against the same steps in one model call: values and every gradient."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.batches.chunks import plan_chunks
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.batches.micro_batch import collate
from rwkv_dpo.batches.step import Step, build_step
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.evaluation.divergence import score_windows
from rwkv_dpo.evaluation.scoring import score_pairs
from rwkv_dpo.kernels.backends import choose_backend
from rwkv_dpo.kernels.linear_logprobs import LogProbs
from rwkv_dpo.objective import chunked_step
from rwkv_dpo.objective.chunked_step import score_chunks
from rwkv_dpo.objective.losses import dpo, l2wrap, mix, preference_loss
from rwkv_dpo.objective.objective import answer_logps, general_loss, objective, score_rows
from rwkv_dpo.objective.preferences import preferences

BETA = 0.3
RNG = np.random.default_rng(0)


def tokens(n):
    return RNG.integers(0, 61, n)


PROMPT = tokens(37)
# Odd lengths, one-token answers (their segments are empty), a shared beginning, an answer that continues the other, a long answer.
PAIRS = [
    (tokens(5), tokens(1), tokens(1)),
    (PROMPT, tokens(45), tokens(19)),
    (tokens(3), np.concatenate([PROMPT, [1, 2]]), np.concatenate([PROMPT, [2]])),
    (tokens(8), PROMPT[:9], PROMPT[:17]),
]
WINDOWS = [tokens(71), tokens(18), tokens(2)]
CASES = {
    "windows": (WINDOWS, []), "pairs": ([], PAIRS), "both": (WINDOWS, PAIRS), "one window": ([tokens(131)], []), "short": ([], PAIRS[:1]),
}  # fmt: skip


def batch_of(case, chunk_ctx, truncated=False):
    windows, pairs = CASES[case]
    refs = np.array([[-4.0 * len(chosen), -4.0 * len(rejected)] for _, chosen, rejected in pairs])
    return collate(windows, pairs, refs, chunk_ctx, truncated), 0.6 if windows and pairs else float(bool(windows))


def loss_and_gradients(model, case, chunk_ctx, truncated=False):
    batch, ratio = batch_of(case, chunk_ctx, truncated)
    assert (batch.plan is not None) == bool(chunk_ctx)
    model.zero_grad()
    loss, metrics = objective(model, batch, dpo(BETA), ratio)
    # Whatever scales the loss (loss scaling, accumulation) has to reach the gradients.
    (3 * loss).backward()
    return loss, metrics, {name: p.grad for name, p in model.named_parameters()}


def assert_same(got, want, tolerance):
    assert got[0].item() == pytest.approx(want[0].item(), rel=tolerance)
    assert {name: v.item() for name, v in got[1].items()} == pytest.approx({name: v.item() for name, v in want[1].items()}, rel=tolerance)
    for name, w in want[2].items():
        g = got[2][name]
        assert (g is None) == (w is None), name
        if w is not None:
            assert (g - w).norm() <= tolerance * w.norm() + 1e-15, name


@pytest.mark.parametrize("direct_borders", [32, 2])
@pytest.mark.parametrize("chunk_ctx", [16, 17, 64, 1000])
@pytest.mark.parametrize("case", CASES)
def test_chunks_change_no_gradient(tiny_shape, monkeypatch, case, chunk_ctx, direct_borders):
    monkeypatch.setattr(chunked_step, "DIRECT_BORDERS", direct_borders)
    model = random_model(tiny_shape, wkv=choose_backend("5", "chunked", torch.device("cpu")).wkv)
    want = loss_and_gradients(model, case, 0)
    assert_same(loss_and_gradients(model, case, chunk_ctx), want, 1e-9)


@pytest.mark.parametrize("version", ["6", "7"])
@pytest.mark.parametrize("chunk_ctx", [16, 64])
def test_chunks_change_no_gradient_of_newer_versions(tiny_shape, version, chunk_ctx):
    model = random_model(tiny_shape, version=version)
    want = loss_and_gradients(model, "both", 0)
    assert_same(loss_and_gradients(model, "both", chunk_ctx), want, 1e-9)


@pytest.mark.parametrize("grad_cp", ["0", "1"])
@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_in_fp32_the_gradients_agree_to_its_rounding(tiny_shape, backend, grad_cp):
    wkv = choose_backend("5", backend, torch.device("cpu")).wkv
    want = loss_and_gradients(random_model(tiny_shape, torch.float32, wkv=wkv), "both", 0)
    model, sizes = random_model(tiny_shape, torch.float32, wkv=wkv, grad_cp=grad_cp), []
    model.register_forward_pre_hook(lambda module, arguments: sizes.append(arguments[0].tokens.numel()))
    assert_same(loss_and_gradients(model, "both", 16), want, 1e-5)
    assert max(sizes) == 16


def test_in_bf16_the_chunks_are_as_near_to_fp32_as_the_whole(tiny_shape):
    exact = loss_and_gradients(random_model(tiny_shape, torch.float32), "both", 0)[2]
    distances = []
    for chunk_ctx in (0, 16):
        model = random_model(tiny_shape, torch.float32)
        model.compute_dtype = torch.bfloat16
        grads = loss_and_gradients(model, "both", chunk_ctx)[2]
        distances.append(sum((grads[n] - g).square().sum() for n, g in exact.items()).sqrt())
    assert distances[1] <= 1.2 * distances[0]


def test_frozen_parameters_get_no_gradient_and_the_others_the_same(tiny_shape):
    def frozen(model):
        for name, p in model.named_parameters():
            p.requires_grad_("blocks.1.ffn" in name or "time_decay" in name)
        return model

    want = loss_and_gradients(frozen(random_model(tiny_shape)), "both", 0)
    got = loss_and_gradients(frozen(random_model(tiny_shape)), "both", 16)
    assert sum(g is None for g in got[2].values()) > 20
    assert_same(got, want, 1e-9)


def test_any_tree_of_segments_may_be_cut(tiny_shape):
    """Depth three, empty segments inside, siblings, roots beside one another; each row scores, some of them twice."""
    model = random_model(tiny_shape)
    builder = ForestBuilder()
    for length, parent in [(19, -1), (35, 0), (0, 0), (1, 0), (17, 0), (4, 2), (33, 1), (0, -1), (6, 5), (21, 7), (16, 9)]:
        builder.add(tokens(length), parent)
    forest, _ = builder.build()
    rows = torch.cat([torch.arange(forest.tokens.numel()), torch.tensor([18, 53, 3])])
    empty = torch.zeros(0, dtype=torch.int64)
    step = Step(forest, rows, torch.from_numpy(tokens(rows.numel())), rows.numel(), empty, empty, 0)
    weights = torch.randn(2, rows.numel(), dtype=torch.float64)
    grads = []
    for scored in (score_rows(model, step), *(score_chunks(model, plan_chunks(step, size)) for size in (16, 20, 5, 500))):
        loss = (weights[0] * scored.logps).sum() + (weights[1] * scored.max_logits).sum()
        grads.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for got in grads[1:]:
        for g, w in zip(got, grads[0], strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def chunk_by_chunk(model, plan, truncated=False):
    """The chunks with autograd through all of them."""
    live, parts = [], []
    for chunk in plan.chunks:
        hidden, live = chunked_step._advance(model, chunk, live)
        parts.append(chunked_step._score(model, chunk, hidden))
        if truncated:
            live = chunked_step._detached(live)
    order = torch.cat([chunk.places for chunk in plan.chunks]).argsort()
    return LogProbs(*(torch.cat(part)[order] for part in zip(*parts, strict=True)))


@pytest.mark.parametrize("case", CASES)
def test_truncated_gradients_are_those_of_states_without_gradients(tiny_shape, case):
    model = random_model(tiny_shape)
    got = loss_and_gradients(model, case, 16, truncated=True)
    batch, ratio = batch_of(case, 16, truncated=True)
    rows, n = chunk_by_chunk(model, batch.plan, truncated=True), batch.step.n_window_rows
    general, of_pairs = torch.zeros(()), torch.zeros(())
    if n:
        general = l2wrap(-rows.logps[:n].mean(), rows.max_logits[:n])
    if batch.step.n_pairs:
        given = preferences(answer_logps(rows.logps, batch.step), batch.ref_logps, batch.step.compared)
        of_pairs = preference_loss(given, dpo(BETA))
    model.zero_grad()
    loss = mix(general, of_pairs, ratio)
    (3 * loss).backward()
    assert got[0].item() == pytest.approx(loss.item(), rel=1e-9)
    exact = loss_and_gradients(random_model(tiny_shape), case, 16)
    assert got[0].item() == pytest.approx(exact[0].item(), rel=1e-12)
    for name, p in model.named_parameters():
        assert (got[2][name] - p.grad).norm() <= 1e-9 * p.grad.norm() + 1e-15, name
    differs = max(float((g - exact[2][name]).norm() / g.norm().clamp(min=1e-12)) for name, g in got[2].items())
    assert differs > 1e-3 if case != "short" else differs < 1e-9


def test_tuned_states_learn_from_the_chunks_that_begin_with_them(tiny_shape):
    """Truncated, the chunks after those have nothing to differentiate."""
    model = random_model(tiny_shape).requires_grad_(False)
    model.add_time_states()
    states = [state.requires_grad_() for state in model.double().add_time_states()]
    got = loss_and_gradients(model, "one window", 16, truncated=True)[2]
    plan = batch_of("one window", 16, truncated=True)[0].plan
    hidden, _ = chunked_step._advance(model, plan.chunks[0], [])
    loss = general_loss(chunked_step._score(model, plan.chunks[0], hidden)) * (plan.chunks[0].places.numel() / plan.n_rows)
    for state, want in zip(states, torch.autograd.grad(3 * loss, states), strict=True):
        [found] = [got[name] for name, p in model.named_parameters() if p is state]
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_truncated_windows_may_take_two_passes(tiny_shape):
    """As they do in fp16, where the scale of the loss has to be known first."""
    model = random_model(tiny_shape)
    plan = plan_chunks(build_step(*CASES["both"]), 16, truncated=True)
    weights = torch.randn(plan.n_rows, dtype=torch.float64)
    got = torch.autograd.grad((score_chunks(model, plan).logps * weights).sum(), list(model.parameters()))
    want = torch.autograd.grad((chunk_by_chunk(model, plan, truncated=True).logps * weights).sum(), list(model.parameters()))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def test_beyond_32_borders_the_states_held_grow_with_the_root(tiny_shape):
    model = random_model(tiny_shape, wkv=choose_backend("5", "chunked", torch.device("cpu")).wkv)
    held = {}
    for n_chunks in (2, 32, 33, 100):
        plan = plan_chunks(build_step([tokens(16 * n_chunks + 1)], []), 16)
        held[n_chunks] = len(score_chunks(model, plan).logps.grad_fn.stored)
    assert held == {2: 2, 32: 32, 33: 6, 100: 10}


def test_dropout_draws_the_same_again_in_the_backward_pass(tiny_shape, monkeypatch):
    """Against the chunks with autograd through all of them, from the same seed."""
    model = random_model(tiny_shape, dropout=0.3).train()
    plan = plan_chunks(build_step([tokens(90)], []), 16)
    torch.manual_seed(5)
    want = torch.autograd.grad(chunk_by_chunk(model, plan).logps.mean(), list(model.parameters()))
    for direct_borders in (32, 2):
        monkeypatch.setattr(chunked_step, "DIRECT_BORDERS", direct_borders)
        torch.manual_seed(5)
        loss = score_chunks(model, plan).logps.mean()
        after = torch.get_rng_state()
        for g, w in zip(torch.autograd.grad(loss, list(model.parameters())), want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)
        assert torch.equal(torch.get_rng_state(), after)


def test_on_a_gpu_what_its_generator_draws_is_drawn_again_too(monkeypatch):
    """Without one: in what order torch is asked for what. A device's type is a string of its own each time it is asked for."""
    device = SimpleNamespace(type="".join(["cu", "da"]))
    model, asked = SimpleNamespace(head=SimpleNamespace(weight=SimpleNamespace(device=device))), []

    @contextmanager
    def fork_rng(devices):
        asked.append(("kept", *devices))
        yield
        asked.append(("put back", *devices))

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: ("state of", device))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: asked.append((*state, device)))
    state = chunked_step._random_state(model)
    assert torch.equal(state["cpu"], torch.get_rng_state())
    with chunked_step._drawing_again(model, state):
        asked.append(("drawn",))
    assert asked == [("kept", device), ("state of", device, device), ("drawn",), ("put back", device)]


@pytest.mark.parametrize("truncated", [False, True])
def test_a_second_derivative_is_refused_instead_of_being_wrong(tiny_shape, truncated):
    model = random_model(tiny_shape)
    batch, ratio = batch_of("one window", 16, truncated)
    loss, _ = objective(model, batch, dpo(BETA), ratio)
    grads = torch.autograd.grad(loss.square(), list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(grad.sum() for grad in grads).backward()


def test_gradients_reach_the_parameters_once_whatever_the_number_of_chunks(tiny_shape):
    """DDP and DeepSpeed count on it."""
    model = random_model(tiny_shape)
    calls = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    loss_and_gradients(model, "both", 16)
    assert len(calls) == len(list(model.parameters()))


def test_without_gradients_only_the_first_pass_runs(tiny_shape):
    model = random_model(tiny_shape)
    step = build_step(*CASES["both"])
    with torch.no_grad():
        got = score_rows(model, step, plan_chunks(step, 16))
        want = score_rows(model, step)
    for g, w in zip(got, want, strict=True):
        assert not g.requires_grad
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_scoring_takes_no_more_tokens_at_once_than_it_may(tiny_shape):
    model, sizes = random_model(tiny_shape), []
    model.register_forward_pre_hook(lambda module, arguments: sizes.append(arguments[0].tokens.numel()))
    pairs, windows = pack_pairs([tuple(map(np.asarray, pair)) for pair in PAIRS]), WINDOWS[:2]
    whole = score_pairs(model, pairs, 1000), score_windows(model, windows, 1000).losses
    assert max(sizes) > 100
    sizes.clear()
    parts = score_pairs(model, pairs, 16), score_windows(model, windows, 16).losses
    assert max(sizes) == 16
    np.testing.assert_allclose(parts[0], whole[0], rtol=1e-9)
    assert parts[1] == pytest.approx(whole[1], rel=1e-9)


lengths = st.integers(1, 60)


@given(st.lists(lengths, max_size=3), st.lists(st.tuples(lengths, lengths, lengths), max_size=4), st.integers(16, 50))
def test_chunks_hold_every_token_once_and_no_more_than_asked(window_lengths, pair_lengths, size):
    if not window_lengths and not pair_lengths:
        return
    step = build_step([tokens(n + 1) for n in window_lengths], [tuple(map(tokens, pair)) for pair in pair_lengths])
    chunks = plan_chunks(step, size).chunks
    sizes = [chunk.forest.tokens.numel() for chunk in chunks]
    assert all(0 < n <= size for n in sizes)
    assert sorted(torch.cat([c.forest.tokens for c in chunks]).tolist()) == sorted(step.forest.tokens.tolist())
    assert sorted(torch.cat([c.places for c in chunks]).tolist()) == list(range(step.scored_rows.numel()))
    # A window has one state at a border, a pair no more than two; short ones that share a chunk add theirs.
    assert all(chunk.keep.numel() <= 2 * (size + 1) for chunk in chunks)


def test_short_segments_share_a_chunk_and_long_ones_have_one_state_at_a_border():
    step = build_step([tokens(129)], [(tokens(9), tokens(5), tokens(7)) for _ in range(3)])
    chunks = plan_chunks(step, 64).chunks
    # Two chunks of the window; the prompts together; all answers together.
    assert [c.forest.n_roots for c in chunks] == [1, 1, 3, 6]
    assert [c.keep.numel() for c in chunks] == [1, 0, 3, 0]
