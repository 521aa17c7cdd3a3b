"""Which windows and pairs make up each micro-batch: a pure function of its number, the rank and the seed."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from rwkv_dpo.batches.micro_batch import MicroBatch, collate
from rwkv_dpo.batches.sampling import LengthOrder, global_index, item_at, magic_prime_start, window_start
from rwkv_dpo.batches.settings import BatchSettings
from rwkv_dpo.data.corpus import Corpus
from rwkv_dpo.data.pairs import PairSet


@dataclass
class Position:
    """Where a resumed run goes on: `batch` micro-batches into `epoch` (Lightning's count). `shift`: by how many samples the
    sequence is ahead of micro-batch numbers times samples, after steps that took more or fewer samples."""

    epoch: int = 0
    batch: int = 0
    shift: int = 0


@dataclass(frozen=True)
class MicroBatches:
    """Micro-batch number k (counted from the first epoch of all) of one rank, whatever came before it.

    ctx_len: tokens in a corpus window. seed: of the order of windows and pairs.
    """

    settings: BatchSettings
    ctx_len: int
    seed: int
    world_size: int
    corpus: Corpus | None
    pairs: PairSet | None
    rank: int
    position: Position = field(default_factory=Position)

    def __getitem__(self, k: int) -> MicroBatch:
        starts, trees = self.contents(k, self.rank)
        chunk_ctx, truncated = self.settings.chunk_ctx, self.settings.tbptt == 1
        windows = [] if self.corpus is None else [self.corpus.window(start, self.ctx_len + 1) for start in starts]
        if self.pairs is None:
            return collate(windows, [], np.zeros((0, 2)), chunk_ctx, truncated)
        numbers = [i for t in trees for i in self.pairs.tree(t)]
        ends = np.cumsum([len(self.pairs.tree(t)) for t in trees])
        batch = collate(
            windows, [self.pairs.pair(i) for i in numbers], self.pairs.ref_logps[numbers], chunk_ctx, truncated,
            [range(end - len(self.pairs.tree(t)), end) for t, end in zip(trees, ends, strict=True)], self.pairs.scores[numbers],
        )  # fmt: skip
        batch = replace(batch, numbers=tuple(numbers))
        if self.world_size == 1:
            return batch
        dealt = np.array(self._trees(k))
        sizes = self.pairs.trees[dealt + 1] - self.pairs.trees[dealt], self.pairs.tree_prompts[dealt]
        pair_share, ranking_share = (self.world_size * size[self.rank].sum() / size.sum() for size in sizes)
        return replace(batch, pair_share=pair_share, ranking_share=ranking_share)

    def contents(self, k: int, rank: int) -> tuple[list[int], list[int]]:
        """What micro-batch k of `rank` holds: first tokens of corpus windows, and trees of the pair file."""
        n, shift = self.settings.micro_bsz, self.position.shift
        samples = [shift + global_index(k, slot, rank, self.world_size, n) for slot in range(n)]
        starts, trees = [], []
        if self.corpus is not None:
            starts = [self._window_start(self.corpus, i) for i in samples]
        if self.pairs is not None:
            trees = self._trees(k)[rank]
        return starts, trees

    def _trees(self, k: int) -> list[list[int]]:
        """What of the pair file micro-batch k of each rank holds."""
        assert self.pairs is not None
        n, shift = self.settings.micro_bsz, self.position.shift
        if self.settings.balance == "tokens":
            return self._length_order.dealt(k, self.world_size, n, shift)
        numbers = [[shift + global_index(k, slot, rank, self.world_size, n) for slot in range(n)] for rank in range(self.world_size)]
        return [[item_at(i, self.pairs.n_trees, self.seed) for i in of_rank] for of_rank in numbers]

    @cached_property
    def _length_order(self) -> LengthOrder:
        assert self.pairs is not None
        return LengthOrder(self.pairs.tree_tokens.tolist(), self.seed)

    def _window_start(self, corpus: Corpus, sample: int) -> int:
        prime, shift = self.settings.magic_prime, max(self.settings.my_pile_shift, 0)
        if prime:
            return magic_prime_start(sample, prime, self.ctx_len) + shift
        return window_start(sample, corpus.n_tokens, self.ctx_len, self.seed)


class EpochNumbers:
    """The micro-batch numbers of one epoch, of the resumed epoch those that are left. Lightning calls set_epoch with its own
    count, which starts at 0."""

    def __init__(self, epoch_begin: int, epoch_steps: int, position: Position) -> None:
        self.epoch_begin, self.epoch_steps, self.position = epoch_begin, epoch_steps, position
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """By Lightning's count, which starts at 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first = (self.epoch_begin + self.epoch) * self.epoch_steps
        done = self.position.batch if self.epoch == self.position.epoch else 0
        return iter(range(first + done, first + self.epoch_steps))

    def __len__(self) -> int:
        return self.epoch_steps


@dataclass(frozen=True)
class Loader:
    """An epoch's micro-batches, from those of a resumed epoch that are left to the next ones with each set_epoch of the sampler.

    is_ahead: a thread prepares the next one while the last one trains. A thread and not a process: that would hand over every tensor
    as a file descriptor or in shared memory, of which a step in chunks needs more than systems allow, and it would die of signals
    that the run means to survive.
    """

    dataset: MicroBatches
    sampler: EpochNumbers
    is_ahead: bool

    def __iter__(self) -> Iterator[MicroBatch]:
        batches = (self.dataset[k] for k in self.sampler)
        return _one_ahead(batches) if self.is_ahead else batches

    def __len__(self) -> int:
        return len(self.sampler)


def _one_ahead(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The same, each made in a thread while its caller is busy with the one before; what fails there is raised here."""
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def build_loader(dataset: MicroBatches, epoch_begin: int, epoch_steps: int, on_gpu: bool) -> Loader:
    """The micro-batches of a run, epoch by epoch, from its first epoch on."""
    # On a CPU preparing ahead would take cores from the training.
    return Loader(dataset, EpochNumbers(epoch_begin, epoch_steps, dataset.position), is_ahead=on_gpu)
