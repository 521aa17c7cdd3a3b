"""Which windows and pairs make up each micro-batch: a pure function of its number, the rank and the seed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from rwkv_dpo.config import RunConfig
from rwkv_dpo.data.corpus import Corpus
from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.objective import MicroBatch, collate
from rwkv_dpo.sampling import LengthOrder, global_index, item_at, magic_prime_start, window_start


@dataclass
class Position:
    """Where a resumed run goes on: `batch` micro-batches into `epoch` (Lightning's count). `shift`: by how many samples the
    sequence is ahead of micro-batch numbers times samples, after steps that took more or fewer samples."""

    epoch: int = 0
    batch: int = 0
    shift: int = 0


@dataclass(frozen=True)
class MicroBatches(Dataset):
    """Micro-batch number k (counted from the first epoch of all) of one rank, whatever came before it."""

    config: RunConfig
    corpus: Corpus | None
    pairs: PairSet | None
    rank: int
    position: Position = field(default_factory=Position)

    def __getitem__(self, k: int) -> MicroBatch:
        starts, rows = self.contents(k, self.rank)
        windows, pairs, ref_logps = [], [], np.zeros((0, 2))
        if self.corpus is not None:
            windows = [self.corpus.window(start, self.config.ctx_len + 1) for start in starts]
        if self.pairs is not None:
            pairs, ref_logps = [self.pairs.pair(row) for row in rows], self.pairs.ref_logps[rows]
        return collate(windows, pairs, ref_logps, self.config.chunk_ctx, self.config.tbptt == 1)

    def contents(self, k: int, rank: int) -> tuple[list[int], list[int]]:
        """What micro-batch k of `rank` holds: first tokens of corpus windows, and rows of the pair file."""
        c, shift = self.config, self.position.shift
        samples = [shift + global_index(k, slot, rank, c.world_size, c.micro_bsz) for slot in range(c.micro_bsz)]
        starts, rows = [], []
        if self.corpus is not None:
            starts = [self._window_start(self.corpus, i) for i in samples]
        if self.pairs is not None:
            if c.balance == "tokens":
                rows = self._length_order.rank_items(k, rank, c.world_size, c.micro_bsz, shift)
            else:
                rows = [item_at(i, len(self.pairs), c.seed) for i in samples]
        return starts, rows

    @cached_property
    def _length_order(self) -> LengthOrder:
        assert self.pairs is not None
        return LengthOrder(np.diff(self.pairs.offsets[::3]).tolist(), self.config.seed)

    def _window_start(self, corpus: Corpus, sample: int) -> int:
        c = self.config
        if c.magic_prime:
            return magic_prime_start(sample, c.magic_prime, c.ctx_len) + max(c.my_pile_shift, 0)
        return window_start(sample, corpus.n_tokens, c.ctx_len, c.seed)


class EpochNumbers(Sampler[int]):
    """The micro-batch numbers of one epoch, of the resumed epoch those that are left. Lightning calls set_epoch with its own
    count, which starts at 0."""

    def __init__(self, epoch_begin: int, epoch_steps: int, position: Position) -> None:
        self.epoch_begin, self.epoch_steps, self.position = epoch_begin, epoch_steps, position
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first = (self.epoch_begin + self.epoch) * self.epoch_steps
        done = self.position.batch if self.epoch == self.position.epoch else 0
        return iter(range(first + done, first + self.epoch_steps))

    def __len__(self) -> int:
        return self.epoch_steps


def build_loader(config: RunConfig, corpus: Corpus | None, pairs: PairSet | None, rank: int, on_gpu: bool) -> DataLoader:
    # On a GPU one worker prepares the next batch meanwhile; on a CPU it would take cores from the training.
    workers = 1 if on_gpu else 0
    position = Position()
    # A loader draws a seed for its workers: from torch's generator, dropout would depend on where a run was resumed.
    return DataLoader(
        MicroBatches(config, corpus, pairs, rank, position), batch_size=None, num_workers=workers, persistent_workers=workers > 0,
        sampler=EpochNumbers(config.epoch_begin, config.epoch_steps, position), generator=torch.Generator(),
    )  # fmt: skip
