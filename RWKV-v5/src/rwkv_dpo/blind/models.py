"""What two models say to questions, and how they rate held-out pairs: computed once, and kept in the folder of the test."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.pairs import PairSet, content_sha256
from rwkv_dpo.data.tokenizer import check_reads_text
from rwkv_dpo.evaluation.answering import BATCH, answer_prompts
from rwkv_dpo.evaluation.generate import Sampling
from rwkv_dpo.evaluation.inputs import vocab_sizes
from rwkv_dpo.evaluation.scoring import evaluate_pairs
from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.files.journal import open_journal
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.objective.losses import Mixture

JOURNAL, HELD_OUT = "answers.journal", "held_out.json"
Load = Callable[[], RWKV]


def vocabulary_of(checkpoints: Sequence[str]) -> int:
    """The size of the one that all of them have. InputError where they differ, or are smaller than the World tokenizer's."""
    sizes = vocab_sizes(checkpoints)
    for path, size in sizes.items():
        check_reads_text(size, f"--load_model {path}")
    if len(set(sizes.values())) > 1:
        refuse(f"--load_model: vocabularies of different sizes: {', '.join(f'{size} of {path}' for path, size in sizes.items())}")
    return next(iter(sizes.values()))


def answer_all(
    folder: Path, loads: Sequence[Load], prompts: Sequence[str], sampling: Sampling, max_tokens: int, seed: int, system: str,
    progress: Callable[[int], object] = lambda n: None,
) -> list[list[str]]:  # fmt: skip
    """The answer of each model to each prompt. Every batch is put into the folder's journal as soon as it is drawn, and called again with
    the same, this takes from there what is done. Only the models that still have to answer are loaded, one after the other. `progress` is
    told how many answers there are."""
    n_batches = -(-len(prompts) // BATCH)
    given = [list(prompts), sampling.__dict__, max_tokens, seed, system]
    with open_journal(folder / JOURNAL, hashlib.sha256(as_json(given).encode()).digest()) as journal:
        for i, load in enumerate(loads):
            n_done = min(max(len(journal.records) - i * n_batches, 0), n_batches)
            progress(min(n_done * BATCH, len(prompts)))
            if n_done == n_batches:
                continue
            for batch in answer_prompts(load(), prompts, 1, sampling, max_tokens, seed, system, n_done * BATCH):
                journal.append(as_json([answer for (answer,) in batch]).encode())
                progress(len(batch))
        texts = [text for record in journal.records for text in json.loads(record)]
    give_memory_back()
    return [texts[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(loads))]


def discard_journal(folder: Path) -> None:
    """To be called when what was made of the answers is written."""
    (folder / JOURNAL).unlink(missing_ok=True)


def score_all(
    folder: Path, loads: Sequence[Load], pairs: PairSet, mixtures: Sequence[Mixture], batch_tokens: int,
    progress: Callable[[int], object] = lambda n: None,
) -> list[dict[str, float]]:  # fmt: skip
    """What evaluate_pairs says of each model; kept in HELD_OUT of the folder, and taken from there for the same pairs and losses."""
    path = folder / HELD_OUT
    of: dict[str, Any] = {"pairs": content_sha256(pairs, True), "losses": list(map(str, mixtures))}
    if (kept := _kept(path, of)) is not None:
        return kept
    reports = []
    for load, mixture in zip(loads, mixtures, strict=True):
        model = load()
        reports.append(evaluate_pairs(model, pairs, mixture, batch_tokens, progress))
        del model  # before the next one is loaded
    give_memory_back()
    with atomic_write(path) as file:
        file.write(as_json({**of, "reports": reports}, indent=1).encode() + b"\n")
    return reports


def give_memory_back() -> None:
    """Votes take hours, in which others may want the GPU's."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _kept(path: Path, of: dict[str, Any]) -> list[dict[str, float]] | None:
    try:
        kept = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return kept["reports"] if isinstance(kept, dict) and {**kept, "reports": None} == {**of, "reports": None} else None
