"""Which corpus window and which pair comes next: pure functions of a running index and a seed.

The run draws one global sequence of samples, and the ranks take turns in it, so a resumed run continues where it was and
a run on any number of ranks sees the same samples per pass. Nothing is stored: an order is computed, never shuffled.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rwkv_dpo.base.errors import InputError

_ROUNDS = 8
_MASK = 2**64 - 1
# Samples that are sorted by length together, and that stay together: enough for neighbours to be alike, few enough to mix.
BLOCK, RUN = 1024, 32


def global_index(step: int, slot: int, rank: int, world_size: int, micro_bsz: int) -> int:
    """Index in the global sequence of the sample in `slot` of micro-batch `step` (micro-batches since the run began, not
    optimizer steps) on `rank`. Each step takes the next world_size * micro_bsz samples, the ranks one after the other."""
    return (step * micro_bsz + slot) * world_size + rank


def item_at(index: int, n: int, seed: int) -> int:
    """Item in range(n) of the global sample `index`, drawn without replacement: every pass holds each item once, in a new
    order."""
    pass_number, position = divmod(index, n)
    return permuted(position, n, _number("order", seed, pass_number))


def permuted(position: int, n: int, seed: int) -> int:
    """Where a seeded shuffle of range(n) puts `position`, in O(1) memory.

    A Feistel network permutes the smallest range(4**k) that holds n; outputs that fall outside range(n) are fed back in
    until one falls inside (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), on average
    after fewer than 4 trips.
    """
    if not 0 <= position < n:
        raise IndexError(f"position {position} is outside range({n})")
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    keys = _round_keys(seed)
    while True:
        left, right = position >> half_bits, position & half_mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & half_mask)
        position = left << half_bits | right
        if position < n:
            return position


@dataclass(frozen=True, eq=False)
class LengthOrder:
    """A global sequence in which neighbours are alike in length, so that the ranks of a step have equally much to do.

    The order of `item_at`, block by block: a block is sorted by length and cut into runs, and the runs are shuffled. Every pass
    holds each item once, and the sequence does not depend on ranks: a resumed run on other ranks continues it.
    """

    lengths: Sequence[int]
    seed: int

    def item_at(self, index: int) -> int:
        """The item at a place of the endless sequence of passes."""
        pass_number, position = divmod(index, len(self.lengths))
        return _block(self, pass_number, position // BLOCK)[position % BLOCK]

    def dealt(self, step: int, world_size: int, micro_bsz: int, shift: int = 0) -> list[list[int]]:
        """The micro_bsz items of each rank in micro-batch `step`, which takes the next world_size * micro_bsz of the sequence, whose
        first is at `shift`."""
        n = world_size * micro_bsz
        first = shift + step * n
        return deal([self.item_at(i) for i in range(first, first + n)], self.lengths, world_size)


@functools.lru_cache(maxsize=4)
def _block(order: LengthOrder, pass_number: int, number: int) -> tuple[int, ...]:
    n, first = len(order.lengths), number * BLOCK
    items = [item_at(pass_number * n + i, n, order.seed) for i in range(first, min(first + BLOCK, n))]
    items.sort(key=order.lengths.__getitem__)
    # What does not fill a run goes last, where it puts no other run out of step.
    n_runs = len(items) // RUN
    starts = [RUN * permuted(i, n_runs, _number("runs", order.seed, pass_number, number)) for i in range(n_runs)]
    return tuple(item for start in [*starts, RUN * n_runs] for item in items[start : start + RUN])


def deal(items: Sequence[int], lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Items, as many for each rank, with sums of lengths as even as a greedy deal makes them: the longest first, a round at a
    time, the longest of a round to the rank that has least."""
    ordered = sorted(items, key=lengths.__getitem__, reverse=True)
    hands: list[list[int]] = [[] for _ in range(world_size)]
    for first in range(0, len(ordered), world_size):
        poorest_first = sorted(hands, key=lambda hand: sum(lengths[item] for item in hand))
        for hand, item in zip(poorest_first, ordered[first : first + world_size], strict=True):
            hand.append(item)
    return hands


def n_windows(n_tokens: int, ctx_len: int) -> int:
    """Windows of one pass of `window_start`: one fewer than fit side by side (but at least one), which leaves the phase of
    a pass at least ctx_len tokens of room."""
    return max(1, (n_tokens - 1) // ctx_len - 1)


def window_start(index: int, n_tokens: int, ctx_len: int, seed: int) -> int:
    """First token of the corpus window of the global sample `index`. A window is ctx_len + 1 tokens, inputs and targets.

    The windows of a pass lie side by side, sharing the one token that is the last target of one and the first input of the
    next, and come once each in a seeded order. The phase at which a pass begins is drawn from all that fit, so that
    passes cut the corpus at different places and reach both of its ends.
    """
    n = n_windows(n_tokens, ctx_len)
    n_phases = n_tokens - n * ctx_len
    if n_phases < 1:
        raise InputError(f"a corpus of {n_tokens} tokens is shorter than one window of --ctx_len {ctx_len} + 1")
    phase = _number("phase", seed, index // n) % n_phases
    return phase + item_at(index, n, seed) * ctx_len


def magic_prime_start(index: int, magic_prime: int, ctx_len: int) -> int:
    """First token of the window of the global sample `index` in RWKV-LM's order. Cubing is a bijection modulo a prime
    3n + 2, so that a pass of `magic_prime` samples meets every window once."""
    sample = 1 + index
    return (_golden(magic_prime) * sample**3 % magic_prime) * ctx_len


def largest_magic_prime(n_tokens: int, ctx_len: int) -> int:
    """The largest prime 3n + 2 that is at most n_tokens // ctx_len - 1, as RWKV-LM's make_data prints it."""
    for candidate in range(n_tokens // ctx_len - 1, 1, -1):
        if candidate % 3 == 2 and _is_prime(candidate):
            return candidate
    raise InputError(f"--magic_prime: {n_tokens} tokens are too few for --ctx_len {ctx_len}; 3 windows are the least")


def check_magic_prime(magic_prime: int, n_tokens: int, ctx_len: int, shift: int = 0) -> None:
    """Refuse (InputError) a --magic_prime that is no prime 3n + 2, reaches past the corpus, or leaves out more than the 1%
    that RWKV-LM allows; the largest one is accepted even where a short corpus leaves a wider gap between primes. And a
    --my_pile_shift that moves the last of its windows past the corpus."""
    largest = largest_magic_prime(n_tokens, ctx_len)
    n_fitting = (n_tokens - 1) // ctx_len
    if magic_prime > n_fitting:
        fault = f"is more than the {n_fitting} windows of --ctx_len {ctx_len} in the corpus"
    elif magic_prime % 3 != 2 or not _is_prime(magic_prime):
        fault = "is not a prime of the form 3n + 2"
    elif magic_prime < min(largest, 0.99 * (n_tokens // ctx_len)):
        fault = f"leaves out more than 1% of the {n_fitting} windows of --ctx_len {ctx_len} in the corpus"
    elif shift > (room := n_tokens - 1 - magic_prime * ctx_len):
        raise InputError(f"--my_pile_shift {shift}: moves the last window past the corpus's {n_tokens} tokens; up to {room} is accepted")
    else:
        return
    raise InputError(f"--magic_prime {magic_prime} {fault}; for its {n_tokens} tokens use {largest}")


def _golden(magic_prime: int) -> int:
    # In double precision and in this order, as RWKV-LM computes it: its runs must find their windows again.
    return int(magic_prime * ((math.sqrt(5) - 1) / 2))


def _is_prime(n: int) -> bool:
    return n >= 2 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def _number(*parts: object) -> int:
    """64 bits that depend on all of `parts`."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=64)
def _round_keys(seed: int) -> tuple[int, ...]:
    return tuple(_number("round", seed, i) for i in range(_ROUNDS))


def _mix(x: int) -> int:
    # Multiply and fold twice: every input bit reaches the low bits that a round uses.
    x = x * 0x9E3779B97F4A7C15 & _MASK
    x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 & _MASK
    return x ^ x >> 32
