"""Reference log-probabilities of pairs under a checkpoint, batch by batch, so that a killed run continues where it was."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rwkv_dpo.data.pairs import PairSet, check_pairs, pairs_sha256
from rwkv_dpo.devices.device import COMPUTE_DTYPES, pick_device, set_up
from rwkv_dpo.evaluation.scoring import score_batch, scoring_batches
from rwkv_dpo.files.hashed import file_sha256
from rwkv_dpo.files.journal import open_journal
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.kernels.backends import name_of
from rwkv_dpo.model.checkpoint import load_model

JOURNAL = "reference.journal"


def score_with_checkpoint(
    pairs: PairSet,
    checkpoint: str | Path,
    folder: Path,
    *,
    device: str,
    precision: str,
    batch_tokens: int,
    wkv_backend: str = "auto",
    quant: str = "none",
    progress: Callable[[int], None] = lambda n: None,
) -> PairSet:
    """The pairs with the log-probabilities of their answers under a .pth file, and its fingerprint in their header.

    Every batch is put into the folder's journal as soon as it is scored. Called again with the same pairs, checkpoint and settings,
    whether it was killed or not, it takes from there what is done, and returns the same numbers; discard_journal ends that.
    `progress` is told how many pairs each batch held. device: auto, cpu or cuda; precision: fp32, tf32, fp16 or bf16.
    quant: the form of the model's projections, as --quant.
    """
    on = pick_device(device, "--device")
    set_up(on, precision)
    model = load_model(checkpoint, device=on, compute_dtype=COMPUTE_DTYPES[precision], wkv_backend=wkv_backend, quant=quant)
    check_pairs(pairs, str(checkpoint), model.shape.vocab_size)
    checkpoint_sha256 = file_sha256(checkpoint)
    settings = [pairs_sha256(pairs), checkpoint_sha256, on.type, precision, batch_tokens, name_of(model.wkv), quant]
    fingerprint = hashlib.sha256(as_json(settings).encode()).digest()
    ref_logps = np.full((len(pairs), 2), np.nan)
    with open_journal(folder / JOURNAL, fingerprint) as journal:
        for i, rows in enumerate(scoring_batches(pairs, batch_tokens)):
            if i == len(journal.records):
                journal.append(score_batch(model, pairs, rows, batch_tokens).astype("<f8").tobytes())
            ref_logps[rows] = np.frombuffer(journal.records[i], "<f8").reshape(-1, 2)
            progress(len(rows))
    return pairs.with_ref_logps(ref_logps, checkpoint_sha256, precision, quant)


def discard_journal(folder: Path) -> None:
    """To be called when all that was made of the scores is written."""
    (folder / JOURNAL).unlink(missing_ok=True)
