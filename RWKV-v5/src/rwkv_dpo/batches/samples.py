"""Which corpus windows and pairs an optimizer step takes, and in which of its model calls: a function of the step's number and the seed."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from rwkv_dpo.batches.packing import pack
from rwkv_dpo.batches.sampling import LengthOrder, global_index, item_at, magic_prime_start, window_start
from rwkv_dpo.batches.settings import BatchSettings
from rwkv_dpo.data.corpus import Corpus
from rwkv_dpo.data.pairs import PairSet


@dataclass
class Position:
    """Where a resumed run continues: `step` optimizer steps into `epoch` (Lightning's count). `shift`: by how many samples the sequence is
    ahead of step numbers times samples, after steps that took more or fewer samples."""

    epoch: int = 0
    step: int = 0
    shift: int = 0


class Sample(NamedTuple):
    """A corpus window, known by its first token, or a tree of the pair file, by its number. group: of the step's means, the one that
    it is part of."""

    is_window: bool
    number: int
    group: int


@dataclass(frozen=True)
class Samples:
    """The samples of optimizer step number k (counted from the first epoch of all), whatever came before it.

    A step is the mean over `accumulated` groups, each of micro_bsz windows, and trees, of every rank.

    ctx_len: tokens in a corpus window. seed: of the order of windows and pairs.
    """

    settings: BatchSettings
    ctx_len: int
    seed: int
    world_size: int
    accumulated: int
    corpus: Corpus | None
    pairs: PairSet | None
    position: Position = field(default_factory=Position)

    def of_step(self, k: int) -> list[list[list[Sample]]]:
        """By rank and by model call: a group a call, or calls filled by tokens (--batch_tokens)."""
        groups = [self._group(k, i) for i in range(self.accumulated)]
        if not self.settings.batch_tokens:
            return [[group[rank] for group in groups] for rank in range(self.world_size)]
        samples = [sample for group in groups for of_rank in group for sample in of_rank]
        calls = pack([self._n_tokens(sample) for sample in samples], self.settings.batch_tokens, self.world_size)
        return [[[samples[i] for i in items] for items in of_rank] for of_rank in calls]

    def _group(self, k: int, i: int) -> list[list[Sample]]:
        """Group i of step k, by rank: its windows, then its trees."""
        number, n, shift = k * self.accumulated + i, self.settings.micro_bsz, self.position.shift
        ranks = range(self.world_size)
        places = [[shift + global_index(number, slot, rank, self.world_size, n) for slot in range(n)] for rank in ranks]
        samples: list[list[Sample]] = [[] for _ in ranks]
        for rank in ranks if self.corpus is not None else ():
            samples[rank] += [Sample(True, self._window_start(place), i) for place in places[rank]]
        if self.pairs is not None:
            trees = [[item_at(place, self.pairs.n_trees, self.seed) for place in of_rank] for of_rank in places]
            if self.settings.balance == "tokens":
                trees = self._length_order.dealt(number, self.world_size, n, shift)
            for rank in ranks:
                samples[rank] += [Sample(False, tree, i) for tree in trees[rank]]
        return samples

    def _n_tokens(self, sample: Sample) -> int:
        return self.ctx_len if sample.is_window else self._tree_tokens[sample.number]

    @cached_property
    def _tree_tokens(self) -> list[int]:
        assert self.pairs is not None
        return self.pairs.tree_tokens.tolist()

    @cached_property
    def _length_order(self) -> LengthOrder:
        return LengthOrder(self._tree_tokens, self.seed)

    def _window_start(self, place: int) -> int:
        assert self.corpus is not None
        prime, shift = self.settings.magic_prime, max(self.settings.my_pile_shift, 0)
        if prime:
            return magic_prime_start(place, prime, self.ctx_len) + shift
        return window_start(place, self.corpus.n_tokens, self.ctx_len, self.seed)
