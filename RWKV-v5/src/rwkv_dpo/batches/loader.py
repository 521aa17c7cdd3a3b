"""The micro-batches of one optimizer step after another, made of its samples, in a thread where that helps."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from rwkv_dpo.batches.micro_batch import MicroBatch, Shares, collate
from rwkv_dpo.batches.samples import Position, Sample, Samples

# What one optimizer step sees of one rank: a micro-batch each model call.
StepBatch = tuple[MicroBatch, ...]


@dataclass(frozen=True)
class Steps:
    """The micro-batches of one rank in optimizer step number k, counted from the first epoch of all."""

    samples: Samples
    rank: int

    def __getitem__(self, k: int) -> StepBatch:
        of_ranks = self.samples.of_step(k)
        totals = self._totals(chain.from_iterable(chain.from_iterable(of_ranks)))
        calls = of_ranks[self.rank]
        return tuple(self._micro_batch(call, totals, len(calls)) for call in calls)

    def _micro_batch(self, call: Sequence[Sample], totals: np.ndarray, n_calls: int) -> MicroBatch:
        s, pairs = self.samples, self.samples.pairs
        starts = [sample.number for sample in call if sample.is_window]
        windows = [s.corpus.window(start, s.ctx_len + 1) for start in starts] if s.corpus is not None else []
        trees = [sample for sample in call if not sample.is_window]
        chunk_ctx, truncated = s.settings.chunk_ctx, s.settings.tbptt == 1
        if pairs is None or not trees:
            batch = collate(windows, [], np.zeros((0, 2)), chunk_ctx, truncated)
            return replace(batch, shares=self._shares(batch, np.zeros(0, np.int64), totals, n_calls))
        of_trees = [pairs.tree(tree.number) for tree in trees]
        numbers, ends = list(chain.from_iterable(of_trees)), np.cumsum([len(tree) for tree in of_trees])
        batch = collate(
            windows, [pairs.pair(i) for i in numbers], pairs.ref_logps[numbers], chunk_ctx, truncated,
            [range(end - len(tree), end) for tree, end in zip(of_trees, ends, strict=True)], pairs.scores[numbers],
        )  # fmt: skip
        groups = np.repeat([tree.group for tree in trees], [len(tree) for tree in of_trees])
        return replace(batch, numbers=tuple(numbers), shares=self._shares(batch, groups, totals, n_calls))

    def _totals(self, samples: Iterator[Sample]) -> np.ndarray:
        """[groups, 3]: pairs, rankings, and tokens of chosen answers, in all groups of a step, on all ranks."""
        totals, pairs = np.zeros((self.samples.accumulated, 3)), self.samples.pairs
        for sample in samples:
            if pairs is not None and not sample.is_window:
                tree = pairs.tree(sample.number)
                totals[sample.group] += len(tree), pairs.tree_prompts[sample.number], pairs.lengths[tree, 1].sum()
        return totals

    def _shares(self, batch: MicroBatch, groups: np.ndarray, totals: np.ndarray, n_calls: int) -> Shares:
        """groups: of the batch's pairs [P]."""
        s, compared = self.samples, batch.step.compared
        of_rankings = np.zeros(compared.n_rankings, np.int64)
        of_rankings[compared.rankings[compared.pairs[:, 0]].numpy()] = groups
        # The mean over the calls of all ranks becomes the mean over the groups.
        n_means, n_pairs, n_rankings = n_calls * s.world_size, len(groups), compared.n_rankings
        return Shares(
            windows=batch.n_windows * n_calls / (s.accumulated * s.settings.micro_bsz),
            pairs=torch.from_numpy(n_pairs * n_means / (s.accumulated * totals[groups, 0])),
            rankings=torch.from_numpy(n_rankings * n_means / (s.accumulated * totals[of_rankings, 1])),
            chosen_lengths=torch.from_numpy(totals[groups, 2] / totals[groups, 0]),
        )


class StepNumbers:
    """The numbers of one epoch's optimizer steps, of the resumed epoch those that are left. Lightning calls set_epoch with its own
    count, which starts at 0."""

    def __init__(self, epoch_begin: int, steps_per_epoch: int, position: Position) -> None:
        self.epoch_begin, self.steps_per_epoch, self.position = epoch_begin, steps_per_epoch, position
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """By Lightning's count, which starts at 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first = (self.epoch_begin + self.epoch) * self.steps_per_epoch
        done = self.position.step if self.epoch == self.position.epoch else 0
        return iter(range(first + done, first + self.steps_per_epoch))

    def __len__(self) -> int:
        return self.steps_per_epoch


@dataclass(frozen=True)
class Loader:
    """An epoch's steps, from those of a resumed epoch that are left to the next ones with each set_epoch of the sampler.

    is_ahead: a thread prepares the next one while the last one trains. A thread and not a process: that would hand over every tensor
    as a file descriptor or in shared memory, of which a step in chunks needs more than systems allow, and it would die of signals
    that the run means to survive.
    """

    dataset: Steps
    sampler: StepNumbers
    is_ahead: bool

    def __iter__(self) -> Iterator[StepBatch]:
        batches = (self.dataset[k] for k in self.sampler)
        return _one_ahead(batches) if self.is_ahead else batches

    def __len__(self) -> int:
        return len(self.sampler)


def _one_ahead(batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
    """The same, each made in a thread while its caller is busy with the one before; what fails there is raised here."""
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def build_loader(dataset: Steps, epoch_begin: int, steps_per_epoch: int, on_gpu: bool) -> Loader:
    """The steps of a run, epoch by epoch, from its first epoch on."""
    # On a CPU preparing ahead would take cores from the training.
    return Loader(dataset, StepNumbers(epoch_begin, steps_per_epoch, dataset.samples.position), is_ahead=on_gpu)
