"""The estimate of a run's memory against torch's own count of what lives while a step runs."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.batches.micro_batch import collate
from rwkv_dpo.kernels.backends import choose_backend
from rwkv_dpo.memory.estimate import PARTS, Plan, alternatives, estimate, total
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.objective.objective import objective
from rwkv_dpo.optimizer.adamw import build_optimizer
from rwkv_dpo.optimizer.settings import OptimizerSettings

SHAPE = ModelShape(n_layer=4, n_embd=256, dim_att=256, dim_ffn=896, vocab_size=8192)
PLAN = Plan(
    shape=SHAPE, n_parameters=0, n_trainable=0, trains_head=True, frozen_bytes=4, compute_bytes=2, optim="adamw", grad_cp="0",
    chunk_ctx=0, n_tokens=0, n_rows=0, n_segments=0, accumulates=False, on_gpu=False, wkv_backend="cpu",
)  # fmt: skip


def peak_of(action) -> int:
    """Most bytes that lived at once while `action` ran, of those it made itself. On one core: the profiler orders events by the core's own
    clock, and those of a virtual machine's cores may differ by more than lies between an allocation and the next."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with torch.profiler.profile(profile_memory=True) as profile:
            action()
    finally:
        os.sched_setaffinity(0, cores)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


CASES = {
    "a window": {},
    "a long window": {"window": 3000},
    "fp32": {"compute_bytes": 4},
    "grad_cp": {"grad_cp": "1"},
    "grad_cp fp32": {"grad_cp": "1", "compute_bytes": 4},
    "grad_cp, a long window": {"grad_cp": "1", "window": 3000},
    "selective": {"grad_cp": "selective"},
    "chunks": {"chunk_ctx": 256, "window": 3000},
    "chunks with grad_cp": {"chunk_ctx": 512, "window": 3000, "grad_cp": "1"},
    "many chunks": {"chunk_ctx": 32, "window": 2000, "shape": replace(SHAPE, n_layer=1, vocab_size=512)},
    "chunked WKV": {"wkv_backend": "chunked"},
    "chunked WKV fp32": {"wkv_backend": "chunked", "compute_bytes": 4},
    "pairs": {"window": 0, "pairs": (256, 200, 150)},
    "pairs and a window": {"window": 600, "pairs": (256, 200, 150)},
    "pairs with grad_cp": {"window": 0, "pairs": (256, 200, 150), "grad_cp": "1"},
    "accumulated": {"accumulates": True},
    "accumulated with grad_cp": {"accumulates": True, "grad_cp": "1"},
    "bf16 moments": {"optim": "adamw_bf16state", "grad_cp": "1", "window": 64},
    "8-bit moments": {"optim": "adamw8bit", "grad_cp": "1", "window": 64},
    "few tokens": {"window": 20},
    "a large vocabulary": {"window": 2500, "shape": replace(SHAPE, n_layer=2, vocab_size=65536)},
    "a large vocabulary, grad_cp": {"window": 600, "shape": replace(SHAPE, n_layer=2, vocab_size=65536), "grad_cp": "1"},
}


def measured(plan: Plan, window: int, pair_lengths: tuple[int, ...]) -> tuple[Plan, float]:
    """The plan with its sizes filled in, and the bytes of weights, optimizer state and a step's peak, counted."""
    rng = np.random.default_rng(0)
    dtype = {2: torch.bfloat16, 4: torch.float32}[plan.compute_bytes]
    wkv = choose_backend(plan.shape.version, plan.wkv_backend, torch.device("cpu")).wkv
    model = random_model(plan.shape, torch.float32, wkv=wkv, grad_cp=plan.grad_cp)
    model.compute_dtype = dtype
    windows = [rng.integers(1, 512, window + 1)] if window else []
    pairs = [tuple(rng.integers(1, 512, n) for n in pair_lengths)] * 2 if pair_lengths else []
    batch = collate(windows, pairs, np.zeros((len(pairs), 2)), plan.chunk_ctx)
    ratio = 0.5 if windows and pairs else float(bool(windows))
    optimizer = build_optimizer(model.named_parameters(), OptimizerSettings(optim=plan.optim))

    def backward() -> None:
        objective(model, batch, dpo(0.1), ratio)[0].backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    # A step of zeros makes the optimizer's state.
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    update()
    if plan.accumulates:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    standing = sum(p.nbytes + (p.grad.nbytes if p.grad is not None else 0) for p in model.parameters())
    standing += sum(x.nbytes for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x))
    peak = standing + peak_of(lambda: (backward(), update()))
    n = sum(p.numel() for p in model.parameters())
    step = batch.step
    filled = replace(
        plan, n_parameters=n, n_trainable=n, n_tokens=step.forest.tokens.numel(), n_rows=step.targets.numel(),
        n_segments=step.forest.n_segments,
    )  # fmt: skip
    return filled, peak


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_estimate_is_within_a_tenth_of_what_a_step_takes(changes):
    changes = dict(changes)
    window, pairs = changes.pop("window", 1000), changes.pop("pairs", ())
    plan, peak = measured(replace(PLAN, **changes), window, pairs)
    assert total(plan) == pytest.approx(peak, rel=0.1)


NEWER = {"6": replace(SHAPE, version="6"), "7": replace(SHAPE, version="7", dim_ffn=1024)}
CASES_OF_NEWER = ("a window", "a long window", "fp32", "grad_cp", "selective", "chunks", "chunked WKV", "pairs and a window")


@pytest.mark.parametrize("version", NEWER)
@pytest.mark.parametrize("case", CASES_OF_NEWER)
def test_the_estimate_of_newer_versions_is_within_a_tenth_too(version, case):
    changes = dict(CASES[case])
    window, pairs = changes.pop("window", 1000), changes.pop("pairs", ())
    plan, peak = measured(replace(PLAN, shape=NEWER[version], **changes), window, pairs)
    assert total(plan) == pytest.approx(peak, rel=0.1)


LARGE = replace(
    PLAN, shape=ModelShape(24, 1024, 1024, 3584, 65536), n_parameters=461_721_600, n_trainable=461_721_600, n_tokens=4700, n_rows=4446,
    n_segments=4, on_gpu=True, wkv_backend="cuda",
)  # fmt: skip


def test_the_parts_are_those_of_the_arithmetic():
    parts = estimate(replace(LARGE, grad_cp="1"))
    assert tuple(parts) == PARTS
    assert parts["weights"] == parts["gradients"] == 4 * 461_721_600
    assert parts["optimizer"] == 8 * 461_721_600
    # Four segments, 24 layers: 16 heads of 64 x 64 fp32 numbers and two rows of 1,024 bf16 ones.
    assert parts["states"] == 4 * 24 * (16 * 64 * 64 * 4 + 2 * 1024 * 2)
    plain = estimate(LARGE)
    # 16.5 rows a block and token, and a state of 64 x 1,024 fp32 numbers every 64 tokens.
    assert plain["activations"] == pytest.approx(24 * 4700 * (12.5 * 1024 * 2 + 1024 * 4), rel=0.02)


def test_every_alternative_that_is_offered_takes_less_and_none_is_offered_twice():
    slow_heap = replace(LARGE, compute_bytes=4, on_gpu=False, wkv_backend="cpu", keeps_heap=True)
    offers = alternatives(slow_heap, n_lora=15_000_000, n_state=1_600_000)
    assert set(offers) == {
        "--grad_cp 1", "--chunk_ctx 512", "--peft lora --lora_r 32", "--peft state", "--optim adamw_bf16state",
        "--optim adamw8bit", "--precision bf16", "--cpu_malloc 0",
    }  # fmt: skip
    assert all(total(offer) < total(slow_heap) for offer in offers.values())
    assert total(offers["--peft state"]) < total(offers["--peft lora --lora_r 32"])
    taken = replace(LARGE, grad_cp="1", chunk_ctx=512, optim="adamw8bit", n_trainable=1_600_000, frozen_bytes=2, trains_head=False)
    assert alternatives(taken, 15_000_000, 1_600_000) == {}


def test_chunks_bound_the_activations_but_for_their_states():
    frozen = replace(LARGE, chunk_ctx=512, n_trainable=1_600_000, frozen_bytes=2, trains_head=False)
    short, long = (estimate(replace(frozen, n_tokens=n, n_rows=n)) for n in (4096, 65536))
    assert long["activations"] == short["activations"]
    # 8 chunks keep the states at each border; of 128, every twelfth border's and those between two such.
    assert long["states"] - short["states"] == (2 * 12 - 8) * 24 * (16 * 64 * 64 * 4 + 2 * 1024 * 2)


@pytest.mark.parametrize(("stage", "weights", "gradients", "moments"), [(1, 8 + 4, 4 + 4, 8), (2, 8 + 4, 4 + 4, 8), (3, 4 + 4 + 8, 4, 8)])
def test_zero_shares_out_what_its_stage_says(stage, weights, gradients, moments):
    """Bytes of two parameters on two ranks: weights and masters, gradients, moments; for stages 1 and 2 when the optimizer works, which
    has the gradients once more, for stage 3 while the weights of both ranks are there. In fp32, which takes no copies of weights."""
    plan = replace(LARGE, zero_stage=stage, world_size=2, n_tokens=1, n_rows=1, n_segments=0, compute_bytes=4)
    parts = estimate(plan)
    n = LARGE.n_parameters / 2
    assert (parts["weights"] / n, parts["gradients"] / n, parts["optimizer"] / n) == (weights, gradients, moments)


def test_a_run_that_trains_little_takes_most_while_the_file_is_mapped():
    tuned = replace(LARGE, chunk_ctx=512, n_trainable=1_600_000, frozen_bytes=2, trains_head=False, file_bytes=923_443_200)
    assert total(tuned) == pytest.approx(2 * 923_443_200, rel=0.01)
    assert total(replace(LARGE, file_bytes=923_443_200)) == total(LARGE)
