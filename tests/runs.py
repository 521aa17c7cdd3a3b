"""What the runs of these tests start from: a tiny model, a corpus and pairs in files, and the flags that they share."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import random_model
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.data.pairs import PairSet, pack_pairs
from rwkv_dpo.evaluation.scoring import score_pairs
from rwkv_dpo.files.hashed import file_sha256
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape

TINY = ModelShape(n_layer=2, n_embd=32, dim_att=32, dim_ffn=96, vocab_size=61, head_size=8)
# ZeRO-3 keeps tensors of up to 100,000 numbers whole on every rank: these matrices are larger.
SHARDED = ModelShape(n_layer=2, n_embd=320, dim_att=320, dim_ffn=320, vocab_size=320, head_size=64)


def write_inputs(folder: Path, shape: ModelShape, n_pairs: int, longest: int = 8) -> PairSet:
    """model.pth, corpus.bin of 4,000 tokens, train.save: pairs of prompts and answers of 2 to `longest` tokens, scored by the model, and
    valid.save: the same answers to prompts that are one token longer. Returns the pairs of train.save."""
    rng = np.random.default_rng(0)
    model = random_model(shape, torch.float32)
    save_weights(model.state_dict(), folder / "model.pth")
    rng.integers(1, shape.vocab_size, 4000).astype("<u2").tofile(folder / "corpus.bin")
    rows = [tuple(rng.integers(1, shape.vocab_size, n) for n in rng.integers(2, longest + 1, 3)) for _ in range(n_pairs)]
    sets = {"train": rows, "valid": [(np.append(0, prompt), *answers) for prompt, *answers in rows]}
    for name, pairs in ((name, pack_pairs(rows)) for name, rows in sets.items()):
        scored = pairs.with_ref_logps(score_pairs(model, pairs, 100), file_sha256(folder / "model.pth"), "fp32")
        save_pairs(folder / f"{name}.save", scored)
    return load_pairs(folder / "train.save")


def flags(data: Path, proj_dir: Path, **changes: Any) -> list[str]:
    """Of train.py, for a run on the files of write_inputs, with the fastest recurrence; a change to None takes a flag away."""
    values = {
        "load_model": data / "model.pth", "proj_dir": proj_dir, "data_file": data / "corpus.bin", "data_type": "uint16", "ctx_len": 12,
        "dpo_train_file": data / "train.save", "dpo_general_corpus_ratio": 0.5, "dpo_beta": 0.1, "accelerator": "cpu", "precision": "fp32",
        "epoch_steps": 4, "epoch_count": 2, "micro_bsz": 2, "lr_init": 1e-3, "lr_final": 1e-4, "epoch_save": 1, "cpu_malloc": 0,
        "enable_progress_bar": False, "wkv_backend": "cpu", **changes,
    }  # fmt: skip
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
