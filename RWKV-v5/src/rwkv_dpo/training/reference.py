"""--dpo_ref: which log-probabilities are the reference of a run's pairs, those in the pair files or those of the model that training starts
from."""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from typing_extensions import override

from rwkv_dpo.base.progress import Progress
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.data.pairs import PairSet, join_pairs, pairs_sha256
from rwkv_dpo.evaluation.reference import JOURNAL, discard_journal
from rwkv_dpo.evaluation.scoring import score_batch, scoring_batches
from rwkv_dpo.files.journal import Journal, open_journal
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.training.halt import Halt
from rwkv_dpo.training.module import DPOModule

log = logging.getLogger(__name__)

REFERENCE_FILE = "reference.save"


class StartIsReference(pl.Callback):
    """--dpo_ref recompute: before the first step, fills the reference log-probabilities of all pair sets, in place, with those of the
    module's model. Every rank ends with the same values; they share the work.

    The run folder keeps them in reference.save. A run that starts again from the same weights, or continues one (epoch_begin above 0),
    reads them from there: a model that has trained since is not the reference. Until all of them exist, rank 0 keeps what is done in
    reference.journal, from which the same run continues.
    """

    def __init__(
        self, sets: Sequence[PairSet], precision: str, batch_tokens: int, wkv_backend: str, continues: bool, folder: Path, halt: Halt,
        shows_bar: bool, every_s: float, ld_alpha: float = 1.0,
    ) -> None:  # fmt: skip
        """batch_tokens: scored at once. continues: the run continues the epochs of an earlier one. every_s: seconds between two lines of
        progress, if there is no terminal for a bar. ld_alpha: of the objective."""
        self.sets, self.precision, self.batch_tokens, self.wkv_backend = sets, precision, batch_tokens, wkv_backend
        self.continues, self.folder, self.halt, self.shows_bar, self.every_s = continues, folder, halt, shows_bar, every_s
        self.path, self.ld_alpha = folder / REFERENCE_FILE, ld_alpha

    @override
    def setup(self, trainer: pl.Trainer, module: DPOModule, stage: str) -> None:  # type: ignore[override]
        # Here processes can communicate, and no strategy has sharded the model yet.
        pairs = join_pairs(self.sets)
        key: dict[str, str] = {}
        kept: list[np.ndarray | None] = []

        def look() -> None:
            key.update(pairs_sha256=pairs_sha256(pairs), reference_precision=self.precision)
            key["weights_sha256"] = weights_sha256(module.model)
            if self.ld_alpha != 1:
                key["ld_alpha"] = str(self.ld_alpha)
            kept.append(self._kept(key))

        self.halt.write(trainer, look)
        ref_logps = trainer.strategy.broadcast(kept[0] if kept else None)
        if ref_logps is None:
            ref_logps = self._scored(trainer, module.model, pairs, key)
            if not np.isfinite(ref_logps).all():
                self.halt.fault = "--dpo_ref recompute: the model that training starts from gives non-finite log-probabilities"
                self.halt.check(True)
            self.halt.write(trainer, lambda: self._keep(replace(pairs, ref_logps=ref_logps, header=key)))
        fill(self.sets, ref_logps)

    def _kept(self, key: dict[str, str]) -> np.ndarray | None:
        if not self.path.exists():
            if self.continues:
                log.warning("%s does not exist: the reference is the model that this run continues from", self.path)
            return None
        kept = load_pairs(self.path)
        free = ("weights_sha256",) if self.continues else ()
        if any(kept.header.get(name) != value for name, value in key.items() if name not in free):
            return None
        log.info("reference log-probabilities of %d pairs from %s", len(kept), self.path)
        return kept.ref_logps

    def _keep(self, scored: PairSet) -> None:
        save_pairs(self.path, scored)
        discard_journal(self.folder)
        log.info("scored %d pairs with the model that training starts from; %s keeps the result", len(scored), self.path)

    def _scored(self, trainer: pl.Trainer, model: RWKV, pairs: PairSet, key: dict[str, str]) -> np.ndarray:
        device, home = trainer.strategy.root_device, model.head.weight.device
        model.to(device).eval()
        batches = scoring_batches(pairs, self.batch_tokens)
        settings = [sorted(key.items()), device.type, self.batch_tokens, self.wkv_backend]
        shows = self.shows_bar and trainer.is_global_zero
        with (
            self._journal(trainer, hashlib.sha256(as_json(settings).encode()).digest()) as journal,
            Progress(len(pairs), "pair", "reference", self.every_s, shows, leave=True) as progress,
        ):
            records: list[bytes] = trainer.strategy.broadcast(list(journal.records) if journal else [])
            n_done = sum(map(len, batches[: len(records)]))
            progress.update(n_done)
            if n_done and trainer.is_global_zero:
                log.info("reference log-probabilities of %d of %d pairs from %s", n_done, len(pairs), self.folder / JOURNAL)
            while len(records) < len(batches):
                # In order of length, so that every rank has about the same work.
                together = batches[len(records) : len(records) + trainer.world_size]
                found = score_shared(trainer, model, pairs, together, self.batch_tokens, self.ld_alpha)
                scores = [part.tobytes() for part in found]
                self.halt.write(trainer, functools.partial(_append, journal, scores))
                records += scores
                progress.update(sum(map(len, together)))
        model.train().to(home)
        ref_logps = np.zeros((len(pairs), 2))
        for rows, record in zip(batches, records, strict=True):
            ref_logps[rows] = np.frombuffer(record, "<f8").reshape(-1, 2)
        return ref_logps

    @contextlib.contextmanager
    def _journal(self, trainer: pl.Trainer, fingerprint: bytes) -> Iterator[Journal | None]:
        """None on ranks other than 0."""
        with contextlib.ExitStack() as stack:
            opened: list[Journal] = []
            self.halt.write(trainer, lambda: opened.append(stack.enter_context(open_journal(self.folder / JOURNAL, fingerprint))))
            yield opened[0] if opened else None


def fill(sets: Sequence[PairSet], ref_logps: np.ndarray) -> None:
    """Put the reference log-probabilities of all pairs [pairs of all sets, 2] into the sets, in place."""
    ends = np.cumsum([len(pairs) for pairs in sets])
    for pairs, rows in zip(sets, np.split(ref_logps, ends[:-1]), strict=True):
        pairs.ref_logps[:] = rows


def score_shared(
    trainer: pl.Trainer, model: RWKV, pairs: PairSet, batches: list[np.ndarray], batch_tokens: int, ld_alpha: float
) -> list[np.ndarray]:
    """score_batch's results for up to world_size batches, of which each rank scores one."""
    scores, rank = [np.zeros((len(rows), 2)) for rows in batches], trainer.global_rank
    if rank < len(batches):
        scores[rank] = score_batch(model, pairs, batches[rank], batch_tokens, ld_alpha)
    mine = torch.from_numpy(np.concatenate(scores)).to(trainer.strategy.root_device)
    everyones = trainer.strategy.reduce(mine, reduce_op="sum").cpu().numpy().astype("<f8")
    return np.split(everyones, np.cumsum([len(rows) for rows in batches])[:-1])


def _append(journal: Journal | None, records: list[bytes]) -> None:
    assert journal is not None, "rank 0 writes"
    for record in records:
        journal.append(record)


def weights_sha256(model: torch.nn.Module) -> str:
    """Fingerprint of all weights, by name."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
