"""--dpo_ref: whose log-probabilities are the reference of a run's pairs, those of the pair files or of the model as training starts."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from tqdm import tqdm

from rwkv_dpo.config import RunConfig
from rwkv_dpo.data.pairs import PairSet, file_sha256, join_pairs, load_pairs, pairs_sha256, save_pairs
from rwkv_dpo.errors import refuse
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.objective import score_batch, scoring_batches
from rwkv_dpo.training.module import DPOModule

log = logging.getLogger(__name__)

REFERENCE_FILE = "reference.save"


class StartIsReference(pl.Callback):
    """--dpo_ref recompute: before the first step, fills the reference log-probabilities of all pair sets, in place, with those of the
    module's model. Every rank ends with the same numbers; they share the work.

    The run folder keeps them in reference.save. A run that starts again from the same weights, or continues one (epoch_begin above 0),
    takes them from there: a model that has learned since is not the reference.
    """

    def __init__(self, config: RunConfig, folder: Path, sets: Sequence[PairSet]) -> None:
        self.config, self.path, self.sets = config, folder / REFERENCE_FILE, sets

    def setup(self, trainer: pl.Trainer, module: DPOModule, stage: str) -> None:  # type: ignore[override]
        # Here processes can talk to each other, and no strategy has taken the model apart yet.
        pairs = join_pairs(self.sets)
        key: dict[str, str] = {}
        kept = None
        if trainer.is_global_zero:
            key = {"pairs_sha256": pairs_sha256(pairs), "reference_precision": self.config.precision}
            key["weights_sha256"] = weights_sha256(module.model)
            kept = self._kept(key)
        ref_logps = trainer.strategy.broadcast(kept)
        if ref_logps is None:
            ref_logps = self._scored(trainer, module.model, pairs)
            if not np.isfinite(ref_logps).all():
                refuse("--dpo_ref recompute: the model that training starts from gives log-probabilities that are not finite")
            if trainer.is_global_zero:
                save_pairs(self.path, replace(pairs, ref_logps=ref_logps, header=key))
        ends = np.cumsum([len(pairs) for pairs in self.sets])
        for pairs, rows in zip(self.sets, np.split(ref_logps, ends[:-1]), strict=True):
            pairs.ref_logps[:] = rows

    def _kept(self, key: dict[str, str]) -> np.ndarray | None:
        if not self.path.exists():
            if self.config.epoch_begin:
                log.warning("%s is not there: the reference is the model that this run continues from", self.path)
            return None
        kept = load_pairs(self.path)
        free = ("weights_sha256",) if self.config.epoch_begin else ()
        if any(kept.header.get(name) != value for name, value in key.items() if name not in free):
            return None
        log.info("reference log-probabilities of %d pairs from %s", len(kept), self.path)
        return kept.ref_logps

    def _scored(self, trainer: pl.Trainer, model: RWKV, pairs: PairSet) -> np.ndarray:
        device = trainer.strategy.root_device
        home = model.head.weight.device
        model.to(device).eval()
        ref_logps = np.zeros((len(pairs), 2))
        # Every world_size-th batch, from the shortest to the longest pairs, is about the same work for every rank.
        batch_tokens = self.config.chunk_ctx or 2 * self.config.ctx_len
        batches = scoring_batches(pairs, batch_tokens)[trainer.global_rank :: trainer.world_size]
        is_quiet = not (self.config.enable_progress_bar and trainer.is_global_zero)
        with tqdm(total=sum(map(len, batches)), unit="pair", desc="reference", disable=is_quiet) as bar:
            for rows in batches:
                ref_logps[rows] = score_batch(model, pairs, rows, batch_tokens)
                bar.update(len(rows))
        model.train().to(home)
        total = trainer.strategy.reduce(torch.from_numpy(ref_logps).to(device), reduce_op="sum")
        log.info("scored %d pairs with the model as training starts; %s keeps the result", len(pairs), self.path)
        return total.cpu().numpy()


def weights_sha256(model: torch.nn.Module) -> str:
    """Fingerprint of all weights, by name."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def tell_differences(config: RunConfig, files: dict[str, PairSet | None]) -> None:
    """A warning for each pair file (by the flag that names it) that was cut to another --ctx_len, or, with --dpo_ref file, scored by
    another checkpoint than --load_model."""
    loaded = ""
    for flag, pairs in files.items():
        if pairs is None:
            continue
        name = f"--{flag} {getattr(config, flag)}"
        ctx_len = pairs.header.get("ctx_len", config.ctx_len)
        if ctx_len != config.ctx_len:
            log.warning("%s was cut to a ctx_len of %s, training has --ctx_len %d; pairs stay as they are", name, ctx_len, config.ctx_len)
        scored_by = pairs.header.get("reference_sha256")
        # A continued run has learned since, and its reference has not.
        if not scored_by or config.dpo_ref != "file" or config.epoch_begin:
            continue
        loaded = loaded or (file_sha256(config.load_model) if config.load_model else "none")
        if scored_by != loaded:
            start = f"--load_model {config.load_model} ({loaded[:12]}...)" if config.load_model else "initial weights"
            log.warning(
                "%s was scored by another file (sha256 %.12s...) than training starts from, %s; --dpo_ref recompute takes the starting "
                "model as the reference", name, scored_by, start,
            )  # fmt: skip


def check_scored(config: RunConfig, flag: str, pairs: PairSet) -> None:
    """InputError for pairs without reference log-probabilities, unless the run computes them."""
    if config.dpo_ref == "file" and not pairs.is_scored:
        refuse(
            f"--{flag} {getattr(config, flag)}: its pairs have no reference log-probabilities; prepare_pairs.py computes them, "
            "and so does --dpo_ref recompute, with the model that training starts from"
        )
