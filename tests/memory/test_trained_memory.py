"""Bytes of trained parameters under each strategy, worked out by hand from what DeepSpeed keeps; what its allocator counts on one device
is in test_memory_on_fake_gpu.py."""

from dataclasses import replace

import pytest
from rwkv_dpo.memory.trained import Trained, held

# A million fp32 weights and Adam: 4 MB of weights, 4 of gradients, 8 of moments.
MB = 1_000_000
PLAIN = Trained(n=MB, n_largest=0, weight_bytes=4, moment_bytes=8, accumulates=False)
TWO_RANKS = replace(PLAIN, zero_stage=2, world_size=2, n_bucket=100_000)


def test_without_a_strategy_gradients_appear_with_the_backward_pass():
    assert held(PLAIN)[:8] == (4 * MB, 8 * MB, 4 * MB, 0, 0, 4 * MB, 4 * MB, 0)
    waiting = held(replace(PLAIN, accumulates=True))
    assert (waiting.forward, waiting.layers, waiting.end, waiting.update) == (4 * MB, 4 * MB, 4 * MB, 4 * MB)


def test_chunks_have_gradients_of_their_own_while_others_wait():
    chunks = held(replace(PLAIN, at_once=True))
    assert (chunks.layers, chunks.end, chunks.update) == (4 * MB, 4 * MB, 4 * MB)
    assert held(replace(PLAIN, at_once=True, accumulates=True)).end == 8 * MB


def test_ddp_keeps_buckets_and_other_gradients_between_those_it_sends():
    assert [held(replace(PLAIN, ddp=True)).forward, held(replace(PLAIN, ddp=True, accumulates=True)).forward] == [4 * MB, 8 * MB]


def test_stage_2_shares_masters_moments_and_gradients():
    parts = held(TWO_RANKS)
    # 4 MB of weights and 2 of masters; half of 8.
    assert (parts.weights, parts.optimizer) == (6 * MB, 4 * MB)
    # Two buckets of 0.4 MB, a copy of one on its way, and the gradients of half of the weights.
    assert (parts.layers, parts.end, parts.full) == (0.8 * MB, 3.2 * MB, 3.2 * MB)
    # Those, and flat once more.
    assert parts.update == 4 * MB
    assert held(replace(TWO_RANKS, accumulates=True)).forward == 2 * MB


def test_stage_1_leaves_gradients_whole_between_micro_batches():
    assert held(replace(TWO_RANKS, zero_stage=1, accumulates=True)).forward == 4 * MB
    alone = held(replace(TWO_RANKS, zero_stage=1, world_size=1))
    # All gradients and a single bucket.
    assert (alone.weights, alone.end) == (8 * MB, 4.4 * MB)


def test_stage_3_shares_weights_and_fetches_them_for_a_step():
    parts = held(replace(TWO_RANKS, zero_stage=3))
    assert (parts.weights, parts.optimizer) == (4 * MB, 4 * MB)
    # 2 MB of gradients and a bucket of 0.4; the whole weights.
    assert (parts.forward, parts.fetched) == (2.4 * MB, 4 * MB)
    assert parts.update == 4.4 * MB
    alone = held(replace(TWO_RANKS, zero_stage=3, world_size=1))
    assert (alone.forward, alone.fetched) == (4.4 * MB, 0)


def test_offloaded_masters_and_moments_are_not_on_the_device():
    parts = held(replace(TWO_RANKS, offload=True, world_size=1))
    assert (parts.weights, parts.optimizer, parts.update) == (4 * MB, 0, 0)
    assert held(replace(TWO_RANKS, offload=True, world_size=1, zero_stage=3)).weights == 0


def test_fp16_weights_have_fp32_masters_and_fp16_gradients():
    parts = held(replace(TWO_RANKS, weight_bytes=2, world_size=1))
    assert (parts.weights, parts.layers) == (6 * MB, 0.2 * MB)
    # In fp16, flat, and in fp32.
    assert parts.update == 8 * MB


@pytest.mark.parametrize(("n_bucket", "left"), [(100_000, 0.875), (500_000, 0.375), (900_000, 0.0), (2_000_000, 0.0)])
def test_a_bucket_is_full_when_some_of_the_backward_pass_is_to_come(n_bucket, left):
    """The head's 0.1 M come first, then 0.8 M of layers, then the embedding's 0.1 M."""
    plan = replace(TWO_RANKS, n_largest=0 if n_bucket > MB else 100_000, n_bucket=n_bucket + (0 if n_bucket > 800_000 else 100_000))
    assert held(plan).left == pytest.approx(left)


def test_no_bucket_is_larger_than_all_gradients():
    assert held(replace(TWO_RANKS, n_bucket=200 * MB)).layers == 8 * MB
