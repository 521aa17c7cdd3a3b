"""Which samples share a model call under --batch_tokens, and what each of them counts for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.batches.loader import Steps
from rwkv_dpo.batches.packing import pack
from rwkv_dpo.batches.samples import Position, Sample
from sampled import CTX_LEN, PAIRS, samples_of


def flat(calls: list[list[list[Sample]]]) -> list[Sample]:
    return [sample for of_rank in calls for call in of_rank for sample in call]


def tokens_of(call: list[Sample]) -> int:
    return sum(CTX_LEN if sample.is_window else int(PAIRS.tree_tokens[sample.number]) for sample in call)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=60), room=st.integers(0, 60), n_ranks=st.integers(1, 4))
def test_packing_takes_every_item_once_within_the_capacity_and_in_as_many_calls_on_every_rank(sizes, room, n_ranks):
    capacity = max(sizes) + room
    calls = pack(sizes, capacity, n_ranks)
    assert sorted(i for of_rank in calls for items in of_rank for i in items) == list(range(len(sizes)))
    assert max(sum(sizes[i] for i in items) for of_rank in calls for items in of_rank) <= capacity
    assert len(calls) == n_ranks
    assert len({len(of_rank) for of_rank in calls}) == 1


def test_a_packing_worked_out_by_hand():
    """25 tokens need three calls of 10: 9, 8 and 5 have a call each, and 2, then 1 go to the 5."""
    assert pack([5, 9, 1, 8, 2], 10, 1) == [[[1], [3], [0, 2, 4]]]
    # Two calls on each of two ranks: 9 and 8 are first calls; of 5 and 2 + 1 the larger one is for the rank with 8.
    assert pack([5, 9, 1, 8, 2], 9, 2) == [[[1], [2, 4]], [[3], [0]]]


def test_an_item_that_no_call_holds_is_an_error():
    with pytest.raises(ValueError, match="an item of 9 does not fit into 8"):
        pack([5, 9], 8, 1)


def test_ranks_are_balanced_in_tokens_call_by_call():
    """64 pairs of log-normal lengths a step on 4 ranks: no rank has a tenth more tokens than the mean, in the step and in each call."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        sizes = (1 + rng.lognormal(4, 0.8, 64)).astype(int).tolist()
        calls = [[sum(sizes[i] for i in items) for items in of_rank] for of_rank in pack(sizes, 2 * max(sizes), 4)]
        for loads in [[sum(of_rank) for of_rank in calls], *zip(*calls, strict=True)]:
            assert max(loads) < 1.1 * np.mean(loads)


@pytest.mark.parametrize("balance", ["none", "tokens"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_tokens", [70, 120, 100_000])
def test_a_packed_step_has_the_samples_of_the_unpacked_one_in_their_groups(balance, world_size, batch_tokens):
    plain, packed = samples_of(world_size, balance=balance), samples_of(world_size, batch_tokens=batch_tokens, balance=balance)
    for k in range(5):
        calls = packed.of_step(k)
        assert sorted(flat(calls)) == sorted(flat(plain.of_step(k)))
        assert max(tokens_of(call) for of_rank in calls for call in of_rank) <= batch_tokens
        assert len({len(of_rank) for of_rank in calls}) == 1
        if batch_tokens == 100_000:
            assert len(calls[0]) == 1


def test_a_packed_run_goes_on_behind_the_samples_that_it_has_taken():
    """5 steps of 2 x 3 x 2 samples, then steps of 3 x 1 on one rank: step 20 of these begins at sample 60."""
    first = [sample for k in range(5) for sample in flat(samples_of(2, batch_tokens=100).of_step(k))]
    later = samples_of(1, 3, 100, Position(shift=60 - 5 * 3), micro_bsz=1)
    then = [sample for k in range(5, 10) for sample in flat(later.of_step(k))]
    whole = [sample for k in range(75) for sample in flat(samples_of(1, 1, micro_bsz=1).of_step(k))]
    for is_window in (True, False):
        taken = [sorted(s.number for s in some if s.is_window == is_window) for some in (first + then, whole)]
        assert taken[0] == taken[1]


@pytest.mark.parametrize("batch_tokens", [0, 70, 100_000])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_shares_sum_up_to_one_in_every_group(batch_tokens, world_size):
    """Over the calls of all ranks, each of which is one part in n of the step's mean."""
    samples = samples_of(world_size, batch_tokens=batch_tokens)
    layout = samples.of_step(2)
    batches = [batch for rank in range(world_size) for batch in Steps(samples, rank)[2]]
    windows, pairs, rankings = 0.0, np.zeros(3), 0.0
    for call, batch in zip([call for of_rank in layout for call in of_rank], batches, strict=True):
        groups = [sample.group for sample in call if not sample.is_window for _ in PAIRS.tree(sample.number)]
        if groups:
            np.add.at(pairs, groups, batch.shares.pairs.numpy() / len(groups) / len(batches))
            rankings += float(batch.shares.rankings.mean()) / len(batches)
        windows += batch.shares.windows / len(batches)
    assert windows == pytest.approx(1, rel=1e-12)
    assert rankings == pytest.approx(1, rel=1e-12)
    assert pairs == pytest.approx(1 / 3, rel=1e-12)


def test_by_itself_a_rank_counts_every_pair_once():
    for batch in Steps(samples_of(1), 0)[1]:
        assert batch.shares.windows == 1
        assert set(batch.shares.pairs.tolist()) == set(batch.shares.rankings.tolist()) == {1.0}
