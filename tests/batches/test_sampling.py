"""Sampling: every item once per pass, whoever draws it."""

import hashlib
import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.batches.sampling import (
    BLOCK,
    RUN,
    LengthOrder,
    check_magic_prime,
    deal,
    global_index,
    item_at,
    largest_magic_prime,
    magic_prime_start,
    n_windows,
    permuted,
    window_start,
)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1009, 4097])
def test_permuted_is_a_bijection(n):
    assert sorted(permuted(i, n, seed=7) for i in range(n)) == list(range(n))


def test_permuted_refuses_positions_outside_its_range():
    for position in (-1, 5):
        with pytest.raises(IndexError):
            permuted(position, 5, seed=0)


def permuted_in_64_bits(n: int, seed: int) -> list[int]:
    """The shuffle of range(n) from the words that describe it, in numpy's integers of 64 bits, which wrap around by themselves: eight
    rounds of a Feistel network over the two halves of 2 k bits, 4**k the smallest that holds n, and what falls outside once more."""
    k = next(k for k in range(1, 33) if 4**k >= n)
    digests = [hashlib.blake2b(f"round/{seed}/{i}".encode(), digest_size=8).digest() for i in range(8)]

    def mixed(x: np.uint64) -> int:
        x = x * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        return int(x ^ (x >> np.uint64(32)))

    def once(place: int) -> int:
        left, right = divmod(place, 2**k)
        for digest in digests:
            left, right = right, left ^ mixed(np.uint64(right) ^ np.frombuffer(digest, "<u8")[0]) % 2**k
        return left * 2**k + right

    places = []
    with np.errstate(over="ignore"):
        for position in range(n):
            place = once(position)
            while place >= n:
                place = once(place)
            places.append(place)
    return places


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 300])
def test_a_seed_has_the_same_order_in_every_version(n):
    """A run of an earlier version that goes on finds its place in it."""
    for seed in (0, 1, -1, 2**63 + 5):
        assert [permuted(i, n, seed) for i in range(n)] == permuted_in_64_bits(n, seed)


@pytest.mark.parametrize("n", [3, 7, 16, 50])
def test_every_place_is_equally_likely_over_seeds(n):
    n_seeds = 200 * n
    counts = Counter(permuted(0, n, seed) for seed in range(n_seeds))
    chi_squared = sum((counts[place] - 200) ** 2 / 200 for place in range(n))
    # Mean n - 1, standard deviation sqrt(2 (n - 1)): five of them are exceeded by chance less than once in 1000 draws, and the
    # seeds are fixed.
    assert chi_squared < (n - 1) + 5 * (2 * (n - 1)) ** 0.5


def test_neighbours_do_not_stay_neighbours():
    n = 1000
    order = [permuted(i, n, seed=3) for i in range(n)]
    n_neighbours = sum(abs(a - b) == 1 for a, b in itertools.pairwise(order))
    # A uniform shuffle has 2 expected, Poisson-distributed.
    assert n_neighbours < 12


@given(n=st.integers(1, 60), seed=st.integers(-5, 2**40), pass_number=st.integers(0, 1000))
def test_each_pass_holds_each_item_once(n, seed, pass_number):
    assert sorted(item_at(pass_number * n + i, n, seed) for i in range(n)) == list(range(n))


def test_passes_and_seeds_differ_in_order():
    n = 50
    orders = [tuple(item_at(p * n + i, n, seed) for i in range(n)) for p in range(3) for seed in range(3)]
    assert len(set(orders)) == 9


@given(
    world_size=st.integers(1, 5), micro_bsz=st.integers(1, 4), n_steps=st.integers(1, 6), first_step=st.integers(0, 1000)
)
def test_ranks_together_take_the_global_sequence_in_turns(world_size, micro_bsz, n_steps, first_step):
    taken = [
        global_index(first_step + step, slot, rank, world_size, micro_bsz)
        for step in range(n_steps) for rank in range(world_size) for slot in range(micro_bsz)
    ]  # fmt: skip
    first = first_step * world_size * micro_bsz
    assert sorted(taken) == list(range(first, first + n_steps * world_size * micro_bsz))


def test_ranks_take_turns_sample_by_sample():
    """Two steps of 2 slots on 3 ranks are 12 samples: rank 0 has the first of every three."""
    assert [global_index(step, slot, 0, 3, 2) for step in (0, 1) for slot in (0, 1)] == [0, 3, 6, 9]


def test_one_pass_on_any_number_of_ranks_holds_every_item_once():
    n = 24
    for world_size in (1, 2, 3, 4):
        seen = [
            item_at(global_index(step, slot, rank, world_size, 2), n, seed=1)
            for rank in range(world_size) for step in range(n // (2 * world_size)) for slot in range(2)
        ]  # fmt: skip
        assert sorted(seen) == list(range(n)), world_size


@given(n_tokens=st.integers(2, 700), ctx_len=st.integers(1, 40), seed=st.integers(0, 99), pass_number=st.integers(0, 9))
def test_windows_of_a_pass_fit_and_do_not_overlap(n_tokens, ctx_len, seed, pass_number):
    if n_tokens < ctx_len + 1:
        return
    n = n_windows(n_tokens, ctx_len)
    starts = sorted(window_start(pass_number * n + i, n_tokens, ctx_len, seed) for i in range(n))
    assert starts[0] >= 0
    assert starts[-1] + ctx_len + 1 <= n_tokens
    assert all(later - earlier == ctx_len for earlier, later in itertools.pairwise(starts))


def test_a_pass_has_one_window_fewer_than_fit_side_by_side():
    # 20 targets are two windows of 10, 29 are two and 9 over, 30 are three.
    assert [n_windows(n_tokens, 10) for n_tokens in (11, 20, 21, 30, 31)] == [1, 1, 1, 1, 2]


def test_passes_cut_at_different_places_and_reach_every_target():
    n_tokens, ctx_len = 103, 10
    n = n_windows(n_tokens, ctx_len)
    starts = [window_start(i, n_tokens, ctx_len, seed=0) for i in range(400 * n)]
    targets = {start + 1 + t for start in starts for t in range(ctx_len)}
    assert targets == set(range(1, n_tokens))
    assert {start % ctx_len for start in starts} == set(range(ctx_len))
    assert {window_start(0, n_tokens, ctx_len, seed) % ctx_len for seed in range(100)} == set(range(ctx_len))


def test_a_corpus_of_exactly_one_window_gives_that_window():
    assert {window_start(i, 11, 10, seed=i) for i in range(20)} == {0}
    with pytest.raises(InputError, match=r"10 tokens is shorter than one window of --ctx_len 10"):
        window_start(0, 10, 10, seed=0)


def test_magic_primes_are_those_that_rwkv_lm_documents():
    # minipile at ctx_len 512 and 4096, and the Pile at 1024, as RWKV-LM's README and trainer give them.
    assert largest_magic_prime(1_498_226_207, 512) == 2_926_181
    assert largest_magic_prime(1_498_226_207, 4096) == 365_759
    assert largest_magic_prime(332_115_325_534, 1024) == 324_331_313


def test_magic_prime_order_worked_out_by_hand():
    # p = 11: golden = int(11 * 0.618) = 6; samples 1, 2, 3: 6 * 1, 6 * 8 = 48, 6 * 27 = 162, modulo 11: 6, 4, 8.
    assert [magic_prime_start(i, 11, 100) for i in range(3)] == [600, 400, 800]


def test_a_shift_keeps_the_last_window_within_the_corpus():
    """11 windows of 100 tokens and the one after them, in 1,130 tokens: the last begins at 1,000 + shift and needs 101."""
    check_magic_prime(11, 1130, 100, shift=29)
    with pytest.raises(InputError, match=r"--my_pile_shift 30: moves the last window past the corpus's 1130 tokens; up to 29 is accepted"):
        check_magic_prime(11, 1130, 100, shift=30)


@pytest.mark.parametrize("magic_prime", [2, 5, 11, 293])
def test_magic_prime_order_meets_every_window_once_per_pass(magic_prime):
    for first in (0, magic_prime, 3):
        starts = [magic_prime_start(first + i, magic_prime, 7) for i in range(magic_prime)]
        assert sorted(starts) == [7 * i for i in range(magic_prime)]


@pytest.mark.parametrize(
    ("magic_prime", "fault"),
    [
        (309, "is not a prime"),
        (305, "is not a prime"),  # 5 * 61 = 3 * 101 + 2
        (307, "is not a prime of the form 3n"),  # prime, but 307 = 3 * 102 + 1
        (311, "is more than the 309 windows"),
        (281, "leaves out more than 1%"),
        (1_000_000_000_000_000_003, "is more than"),
        (0, "is not a prime"),
    ],
)
def test_a_bad_magic_prime_is_refused_with_the_right_one(magic_prime, fault):
    with pytest.raises(InputError, match=rf"--magic_prime {magic_prime} {fault}.*use 293"):
        check_magic_prime(magic_prime, n_tokens=39_582, ctx_len=128)


def test_good_magic_primes_are_accepted():
    # 293 is 5% below the 309 windows, but no prime 3n + 2 lies between.
    check_magic_prime(293, n_tokens=39_582, ctx_len=128)
    check_magic_prime(2_926_181, n_tokens=1_498_226_207, ctx_len=512)


def test_one_percent_is_what_a_magic_prime_may_leave_out():
    # Of 10,000 windows: 9,923 and 9,887 are both primes 3n + 2, and 9,941 is the largest.
    check_magic_prime(9923, n_tokens=1_280_000, ctx_len=128)
    with pytest.raises(InputError, match=r"leaves out more than 1% of the 9999 windows .*use 9941"):
        check_magic_prime(9887, n_tokens=1_280_000, ctx_len=128)


def test_a_corpus_without_a_magic_prime_is_refused():
    assert largest_magic_prime(30, 10) == 2
    with pytest.raises(InputError, match=r"--magic_prime: 29 tokens are too few"):
        largest_magic_prime(29, 10)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200), seed=st.integers(0, 99), pass_number=st.integers(0, 9))
def test_a_pass_in_length_order_holds_each_item_once(lengths, seed, pass_number):
    order, n = LengthOrder(lengths, seed), len(lengths)
    assert sorted(order.item_at(pass_number * n + i) for i in range(n)) == list(range(n))


@pytest.mark.parametrize("n", [1023, 1024, 1025, 2500])
def test_passes_longer_than_a_block_hold_each_item_once(n):
    order = LengthOrder([i % 97 for i in range(n)], seed=2)
    assert sorted(order.item_at(i) for i in range(n)) == list(range(n))
    assert [order.item_at(i) for i in range(n)] != [order.item_at(n + i) for i in range(n)]


@given(n=st.integers(1, 80), world_size=st.integers(1, 5), micro_bsz=st.integers(1, 4), first_step=st.integers(0, 99))
def test_steps_take_the_same_sequence_whatever_the_ranks(n, world_size, micro_bsz, first_step):
    order, n_step = LengthOrder([(7 * i) % 31 for i in range(n)], seed=4), world_size * micro_bsz
    for step in (first_step, first_step + 1):
        ranks = order.dealt(step, world_size, micro_bsz)
        assert [len(items) for items in ranks] == [micro_bsz] * world_size
        assert sorted(itertools.chain(*ranks)) == sorted(order.item_at(i) for i in range(step * n_step, (step + 1) * n_step))


def test_runs_of_like_length_stay_together_and_come_in_an_order_of_their_own():
    """Lengths that are item numbers; two blocks of 32 runs a pass, and one of a run and the 4 longest of its items."""
    n, orders = 2 * BLOCK + RUN + 4, []
    for seed, pass_number in itertools.product((3, 4), (0, 1)):
        order = LengthOrder(range(n), seed)
        items = [order.item_at(pass_number * n + i) for i in range(n)]
        for block in (items[:BLOCK], items[BLOCK : 2 * BLOCK]):
            runs = [block[i : i + RUN] for i in range(0, BLOCK, RUN)]
            by_length = sorted(block)
            starts = [by_length.index(run[0]) for run in runs]
            assert runs == [by_length[start : start + RUN] for start in starts]
            assert sorted(starts) == list(range(0, BLOCK, RUN))
            orders.append(tuple(starts))
        assert items[2 * BLOCK :] == sorted(items[2 * BLOCK :])
    assert len(set(orders)) == 8


def test_a_resumed_run_deals_from_the_sample_that_is_next():
    order = LengthOrder([(7 * i) % 31 for i in range(50)], seed=4)
    taken = [item for items in order.dealt(2, 3, 2, shift=5) for item in items]
    assert sorted(taken) == sorted(order.item_at(i) for i in range(5 + 2 * 6, 5 + 3 * 6))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_one_pass_in_length_order_on_any_number_of_ranks_holds_every_item_once(world_size):
    n = 2048
    order = LengthOrder(log_normal_lengths(n), seed=1)
    steps, ranks = range(n // (2 * world_size)), range(world_size)
    seen = [item for step in steps for rank in ranks for item in order.dealt(step, world_size, 2)[rank]]
    assert sorted(seen) == list(range(n))


def test_a_deal_worked_out_by_hand():
    # 9 and 8, then 5 to the hand with 8 and 1 to the hand with 9.
    assert deal([0, 1, 2, 3], [5, 9, 1, 8], 2) == [[1, 2], [3, 0]]


def log_normal_lengths(n: int) -> list[int]:
    generator = random.Random(5)
    return [1 + int(generator.lognormvariate(5, 0.8)) for _ in range(n)]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("micro_bsz", [1, 4])
def test_the_slowest_rank_has_at_most_15_percent_more_tokens_than_the_mean(world_size, micro_bsz):
    lengths = log_normal_lengths(4999)
    order = LengthOrder(lengths, seed=1)
    n_steps = 3 * len(lengths) // (world_size * micro_bsz)
    excesses = []
    for step in range(n_steps):
        tokens = [sum(lengths[item] for item in items) for items in order.dealt(step, world_size, micro_bsz)]
        excesses.append(max(tokens) * world_size / sum(tokens) - 1)
    assert sum(excesses) / n_steps < 0.15
