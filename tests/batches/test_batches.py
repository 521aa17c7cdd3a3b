"""Which samples a rank sees: every one exactly once a pass, whatever the number of ranks, and from any step on."""

import os
import resource
import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.batches.loader import StepNumbers, Steps, build_loader
from rwkv_dpo.batches.samples import Position, Samples
from rwkv_dpo.batches.settings import BatchSettings
from rwkv_dpo.data.corpus import Corpus
from rwkv_dpo.data.pairs import pack_pairs

N_PAIRS = 24
PAIRS = pack_pairs([([100 + i, 1], [2], [3, 4]) for i in range(N_PAIRS)], np.arange(2.0 * N_PAIRS).reshape(N_PAIRS, 2))
CORPUS = Corpus("numbers", np.arange(10_001), vocab_size=20_000)
SETTINGS = BatchSettings(micro_bsz=2)
STEPS_PER_EPOCH = 3


def dataset(corpus, pairs, rank=0, world_size=1, ctx_len=100, position=None, accumulated=1, **changes):
    samples = Samples(replace(SETTINGS, **changes), ctx_len, 4, world_size, accumulated, corpus, pairs, position or Position())
    return Steps(samples, rank)


def pairs_of(batch):
    (micro_batch,) = batch
    tokens = micro_batch.step.forest.tokens.tolist()
    return [t - 100 for t in tokens if 100 <= t < 100 + N_PAIRS and t != 0]


@pytest.mark.parametrize("balance", ["none", "tokens"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_pair_is_seen_once_a_pass_over_any_number_of_ranks(world_size, balance):
    steps = N_PAIRS // (SETTINGS.micro_bsz * world_size)
    for first in (0, steps, 5 * steps):
        seen = Counter(
            p
            for rank in range(world_size)
            for k in range(first, first + steps)
            for p in pairs_of(dataset(None, PAIRS, rank, world_size, balance=balance)[k])
        )
        assert seen == Counter(range(N_PAIRS))


def test_two_ranks_of_one_pair_see_what_one_rank_of_two_sees():
    one = [pairs_of(dataset(None, PAIRS)[k]) for k in range(9)]
    ranks = [[pairs_of(dataset(None, PAIRS, rank, 2, micro_bsz=1)[k])[0] for rank in range(2)] for k in range(9)]
    assert one == ranks


def test_ranks_get_pairs_of_like_length():
    lengths = np.random.default_rng(0).permutation(np.repeat([10, 100], 64))
    pairs = pack_pairs([(np.ones(n), [2], [3]) for n in lengths], np.zeros((128, 2)))
    tokens = [[dataset(None, pairs, rank, 2, micro_bsz=1)[k][0].step.forest.tokens.numel() for rank in range(2)] for k in range(64)]
    assert all(a == b for a, b in tokens)
    assert {a for a, _ in tokens} == {10, 100}


def test_reference_scores_travel_with_their_pairs():
    batch = dataset(None, PAIRS)[7]
    assert batch[0].ref_logps.tolist() == [[2.0 * p, 2.0 * p + 1] for p in pairs_of(batch)]


def test_windows_are_disjoint_across_ranks_within_a_pass():
    datasets = [dataset(CORPUS, None, rank, 2) for rank in range(2)]
    # 99 windows of 100 tokens a pass: 24 steps of 4 hold 96 of them.
    rows = [d[k][0].step.forest.tokens.view(2, 100) for k in range(24) for d in datasets]
    starts = sorted(int(window[0]) for batch in rows for window in batch)
    assert all(b - a >= 100 for a, b in pairwise(starts))


def test_magic_prime_visits_its_windows_in_rwkv_lms_order():
    # 97 = 3 * 32 + 1 is no prime 3n + 2; 89 is. int(89 * 0.618...) = 55; sample ii starts at (55 * ii**3 mod 89) * 100.
    windows = dataset(CORPUS, None, magic_prime=89, my_pile_shift=7, micro_bsz=1)
    assert [int(windows[k][0].step.forest.tokens[0]) for k in range(3)] == [
        55 * 1 % 89 * 100 + 7,
        55 * 8 % 89 * 100 + 7,
        55 * 27 % 89 * 100 + 7,
    ]


def test_epochs_continue_the_numbering_of_their_steps():
    numbers = StepNumbers(epoch_begin=2, steps_per_epoch=3, position=Position())
    numbers.set_epoch(1)
    assert list(numbers) == [9, 10, 11]
    assert len(numbers) == 3


def test_a_resumed_epoch_has_what_is_left_of_it_and_the_next_one_is_whole():
    numbers = StepNumbers(epoch_begin=2, steps_per_epoch=3, position=Position(epoch=1, step=2))
    numbers.set_epoch(1)
    assert list(numbers) == [11]
    numbers.set_epoch(2)
    assert list(numbers) == [12, 13, 14]


@pytest.mark.parametrize("balance", ["none", "tokens"])
def test_after_a_change_of_the_micro_batch_the_sequence_goes_on_where_it_was(balance):
    """3 micro-batches of 2 x 2 pairs, then 12 of 1 pair: every pair of the pass once."""
    # Micro-batch 3 of 1 pair would begin at sample 3 and has to begin at sample 12.
    later = dataset(None, PAIRS, position=Position(shift=9), micro_bsz=1, balance=balance)
    seen = [p for k in range(3) for rank in range(2) for p in pairs_of(dataset(None, PAIRS, rank, 2, balance=balance)[k])]
    assert sorted(seen + [p for k in range(3, 15) for p in pairs_of(later[k])]) == list(range(N_PAIRS))


def tokens_of(loader) -> list[list[int]]:
    return [batch.step.forest.tokens.tolist() for (batch,) in loader]


def test_batches_made_ahead_are_the_same():
    here, ahead = (build_loader(dataset(CORPUS, PAIRS), 0, STEPS_PER_EPOCH, on_gpu=on_gpu) for on_gpu in (False, True))
    for epoch in (0, 1):
        here.sampler.set_epoch(epoch)
        ahead.sampler.set_epoch(epoch)
        assert tokens_of(here) == tokens_of(ahead)
    assert len(tokens_of(here)) == len(here) == STEPS_PER_EPOCH


@pytest.fixture
def few_files():
    """No more than 50 files may be open beside those that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="open files are counted in /proc")
def test_a_step_of_many_chunks_takes_no_open_files(few_files):
    """8 windows of 128 chunks each: some 10,000 tensors a batch."""
    corpus = Corpus("numbers", np.arange(20_000), vocab_size=20_000)
    got: list[int] = []
    loader = build_loader(dataset(corpus, None, ctx_len=2048, chunk_ctx=16, micro_bsz=8), 0, STEPS_PER_EPOCH, on_gpu=True)
    # A loader that waits for ever fails here.
    thread = threading.Thread(target=lambda: got.extend(len(batch.plan.chunks) for (batch,) in loader), daemon=True)
    thread.start()
    thread.join(60)
    assert got == [1024] * STEPS_PER_EPOCH


class Failing(Corpus):
    def window(self, start: int, n: int) -> np.ndarray:
        raise InputError("numbers: token 3 at 7 is outside the vocabulary")


def test_what_fails_ahead_is_told_in_its_own_words():
    failing = Failing("numbers", np.arange(10_001), vocab_size=2)
    with pytest.raises(InputError) as error:
        list(build_loader(dataset(failing, PAIRS), 0, STEPS_PER_EPOCH, on_gpu=True))
    assert str(error.value) == "numbers: token 3 at 7 is outside the vocabulary"
