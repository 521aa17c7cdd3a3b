"""What a run measures on held-out data."""

import logging
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
from tqdm import tqdm
from typing_extensions import override

from rwkv_dpo.data.corpus import Corpus
from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.evaluation.divergence import perplexity, score_windows
from rwkv_dpo.evaluation.scoring import evaluate_pairs
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.objective.losses import Mixture
from rwkv_dpo.optimizer.length import RunLength
from rwkv_dpo.training.halt import Halt
from rwkv_dpo.training.metrics import finite
from rwkv_dpo.training.module import DPOModule

log = logging.getLogger(__name__)


class Measure(Protocol):
    """Held-out data of one kind."""

    def figures(self, model: RWKV, shows_bar: bool) -> dict[str, Any]:
        """By the names in valid.jsonl."""

    def words(self, figures: dict[str, Any]) -> str:
        """The words of the line that is printed."""


class HeldOutPairs:
    """Loss, accuracy with its interval, margins, and the length of the preferred answers."""

    def __init__(self, pairs: PairSet, mixture: Mixture, batch_tokens: int) -> None:
        """batch_tokens: scored at once."""
        self.pairs, self.mixture, self.batch_tokens = pairs, mixture, batch_tokens

    def figures(self, model: RWKV, shows_bar: bool) -> dict[str, Any]:
        """For all pairs, on every rank."""
        with tqdm(total=len(self.pairs), unit="pair", desc="held-out", leave=False, disable=None if shows_bar else True) as bar:
            metrics = evaluate_pairs(model, self.pairs, self.mixture, self.batch_tokens, bar.update)
        figures: dict[str, Any] = {"pairs": len(self.pairs), **{name: finite(value) for name, value in metrics.items()}}
        figures["rewards/accuracies_95"] = interval(metrics["rewards/accuracies"], len(self.pairs))
        return figures

    def words(self, figures: dict[str, Any]) -> str:
        """As in "40 held-out pairs: DPO loss 0.6, ..."."""
        loss, margin = (math.nan if figures[name] is None else figures[name] for name in ("loss_dpo", "rewards/margins"))
        low, high = figures["rewards/accuracies_95"]
        accuracy = f"accuracy {figures['rewards/accuracies']:.3f} ({low:.3f} to {high:.3f})"
        return f"{figures['pairs']} held-out pairs: DPO loss {loss:.4f}, {accuracy}, margin {margin:.4f}"


class HeldOutCorpus:
    """Loss and perplexity on windows of a corpus, from its start."""

    def __init__(self, corpus: Corpus, ctx_len: int, n_windows: int, batch_tokens: int) -> None:
        """n_windows: at most this many, 0: all of them. batch_tokens: scored at once."""
        self.corpus, self.ctx_len, self.batch_tokens = corpus, ctx_len, batch_tokens
        self.starts = range(0, corpus.n_tokens - ctx_len, ctx_len)[: n_windows or None]

    def figures(self, model: RWKV, shows_bar: bool) -> dict[str, Any]:
        """For all windows, on every rank."""
        with tqdm(self.starts, unit="window", desc="held-out", leave=False, disable=None if shows_bar else True) as bar:
            windows = (self.corpus.window(start, self.ctx_len + 1) for start in bar)
            loss = float(score_windows(model, windows, self.batch_tokens).losses.mean())
        return {"windows": len(self.starts), "corpus_loss": finite(loss), "corpus_perplexity": finite(perplexity(loss))}

    def words(self, figures: dict[str, Any]) -> str:
        """As in "64 held-out windows: loss 2.1, perplexity 8.2"."""
        loss = math.nan if figures["corpus_loss"] is None else figures["corpus_loss"]
        return f"{figures['windows']} held-out windows: loss {loss:.4f}, perplexity {perplexity(loss):.2f}"


class HeldOut(pl.Callback):
    """Evaluates at the end of every epoch, and, if every is above 0, before the first optimizer step and every N steps: each time a printed
    line and a line in valid.jsonl."""

    def __init__(self, measures: Sequence[Measure], length: RunLength, every: int, folder: Path, halt: Halt, shows_bar: bool) -> None:
        self.measures, self.length, self.every = measures, length, every
        self.folder, self.halt, self.shows_bar = folder, halt, shows_bar
        self.record: dict[str, Any] = {}  # of the last evaluation
        self.step = 0  # optimizer steps of this run until then, or until it was resumed

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        self.step = trainer.global_step
        if self.every and not trainer.global_step:
            self._evaluate(trainer, module)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, module: DPOModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self.every and trainer.global_step != self.step and not trainer.global_step % self.every:
            self._evaluate(trainer, module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if self.step != trainer.global_step or not self.record:
            self._evaluate(trainer, module)

    def _evaluate(self, trainer: pl.Trainer, module: DPOModule) -> None:
        self.step = trainer.global_step
        shows_bar = self.shows_bar and trainer.is_global_zero
        module.model.eval()
        found = [(measure, measure.figures(module.model, shows_bar)) for measure in self.measures]
        module.model.train()
        self.record = when(trainer, self.length)
        for _, figures in found:
            self.record |= figures
        if not trainer.is_global_zero or not found:
            return
        self.halt.append(self.folder / "valid.jsonl", as_json(self.record) + "\n")
        words = "; ".join(measure.words(figures) for measure, figures in found)
        log.info("epoch %d, step %d, %s", self.record["epoch"], self.record["step"], words)


class AfterEvaluation(pl.Callback):
    """Acts once on every evaluation of held_out; comes after it in the order of callbacks."""

    def __init__(self, held_out: HeldOut) -> None:
        self.held_out = held_out
        self.seen = held_out.record

    def on_evaluation(self, trainer: pl.Trainer, module: DPOModule, record: dict[str, Any]) -> None:
        """On every rank. record: as in valid.jsonl."""
        raise NotImplementedError

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        self._look(trainer, module)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, module: DPOModule, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self._look(trainer, module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        self._look(trainer, module)

    def _look(self, trainer: pl.Trainer, module: DPOModule) -> None:
        if self.held_out.record is not self.seen:
            self.seen = self.held_out.record
            self.on_evaluation(trainer, module, self.seen)


def when(trainer: pl.Trainer, length: RunLength) -> dict[str, Any]:
    """The epoch, and the number of optimizer steps, including those of earlier runs."""
    step = length.epoch_begin * length.steps_per_epoch + trainer.global_step
    return {"epoch": length.epoch_begin + trainer.current_epoch, "step": step}


def drawn(pairs: PairSet, n: int, seed: int) -> PairSet:
    """n of the pairs, or all of them if n is 0 or there are fewer."""
    if not 0 < n < len(pairs):
        return pairs
    return pairs.select(sorted(random.Random(seed).sample(range(len(pairs)), n)))


def interval(share: float, n: int) -> list[float]:
    """The 95 % confidence interval of a share, if it was observed among n samples (Wilson 1927).

    >>> [round(bound, 3) for bound in interval(0.5, 100)]
    [0.404, 0.596]
    """
    z = 1.959964
    middle, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    # Rounding would print -0.000 for a share of 0.
    return [max((middle - width) / (1 + z * z / n), 0.0), min((middle + width) / (1 + z * z / n), 1.0)]
