"""What the runs of these tests start from: a tiny model, a corpus and pairs in files, and the flags that they share."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_model
from lives import free_port, steps_written
from rwkv_dpo.commands import train
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.data.pairs import PairSet, pack_pairs
from rwkv_dpo.evaluation.scoring import score_pairs
from rwkv_dpo.files.hashed import file_sha256
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.training.halt import Halt

TINY = ModelShape(n_layer=2, n_embd=32, dim_att=32, dim_ffn=96, vocab_size=61, head_size=8)
# Of the small matrices of newer versions of it.
RANKS = {"6": (80, 24), "7": (8, 16, 24, 40)}
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
    """Of train.py, for a run on the files of write_inputs, with the fastest recurrence; a change to None takes a flag away, and DATA/ in
    one stands for `data`."""
    values = {
        "load_model": "DATA/model.pth", "proj_dir": proj_dir, "data_file": "DATA/corpus.bin", "data_type": "uint16", "ctx_len": 12,
        "dpo_train_file": "DATA/train.save", "dpo_general_corpus_ratio": 0.5, "dpo_beta": 0.1, "accelerator": "cpu", "precision": "fp32",
        "epoch_steps": 4, "epoch_count": 2, "micro_bsz": 2, "lr_init": 1e-3, "lr_final": 1e-4, "epoch_save": 1, "cpu_malloc": 0,
        "enable_progress_bar": False, "wkv_backend": "cpu", **changes,
    }  # fmt: skip
    given = {name: str(value).replace("DATA/", f"{data}/") for name, value in values.items() if value is not None}
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run_until(step: int, flags: list[str], act: Callable[[], Any] = terminate) -> None:
    """A run in this process; once `step` lines of metrics are written another thread does `act`."""
    folder, done = Path(flags[flags.index("--proj_dir") + 1]), threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            if steps_written(folder) >= step:
                act()
                return

    # A signal that comes after the run's end must not end the tests.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        train.main(flags)
    finally:
        done.set()
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


def run_to(step: int, flags: list[str]) -> None:
    """A run in this process that is stopped after just that many steps, more than one."""
    append = Halt.append

    def append_and_stop(halt: Halt, path: Path, text: str) -> None:
        append(halt, path, text)
        # All ranks know it a step later.
        halt.signalled |= path.name == "metrics.jsonl" and steps_written(path.parent) == step - 1

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Halt, "append", append_and_stop)
        train.main(flags)


def environment(**variables: Any) -> dict[str, str]:
    """Of a process that begins a run of its own: a ddp run in this process would leave its address in the environment."""
    of_ranks = ("MASTER_", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "RANK", "GROUP_RANK", "PL_", "SLURM_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(of_ranks)}
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MASTER_PORT": free_port(), **variables}
    return kept | {name: str(value) for name, value in own.items()}
