#!/usr/bin/env python3
"""Kills training runs by SIGKILL at random moments, in the middle of saves too, and starts them again until they end, through
train.py itself, into benchmarks/results/kill_and_resume.json.

    python benchmarks/kill_and_resume.py [--kills 8] [--seed 0] [--parts one_process ddp_2]

Every run is held against one that nothing interrupted: the bytes of rwkv-final.pth and every line of metrics.jsonl, clock and
memory fields aside. A difference ends the script with status 1.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "RWKV-v5" / "src"), str(ROOT / "tests"), str(Path(__file__).parent)]

import torch  # noqa: E402 (the path above makes the package importable without installing it)
from lives import records  # noqa: E402 (as above)
from measure import save  # noqa: E402 (as above)
from rwkv_dpo.data.pair_files import save_pairs  # noqa: E402 (as above)
from rwkv_dpo.data.pairs import pack_pairs  # noqa: E402 (as above)
from rwkv_dpo.kernels.backends import choose_backend  # noqa: E402 (as above)
from rwkv_dpo.model.checkpoint import empty_model, save_weights  # noqa: E402 (as above)
from rwkv_dpo.model.init import init_weights  # noqa: E402 (as above)
from rwkv_dpo.model.shape import ModelShape  # noqa: E402 (as above)

PARTS = {"one_process": {}, "ddp_2": {"devices": 2, "strategy": "ddp"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=8, help="of each run; each part makes two, saving every step and every third")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            rows = campaign(Path(folder), PARTS[part], args)
        save("kill_and_resume", {part: rows})
        if not all(row["same bytes of rwkv-final.pth"] and row["same metrics.jsonl"] for row in rows):
            sys.exit("a resumed run differs from the whole one")


def campaign(folder: Path, layout: dict, args: argparse.Namespace) -> list[dict]:
    write_data(folder)
    whole = start(folder, "whole", layout)
    if whole.wait():
        sys.exit("the run that nothing interrupts failed")
    rows = []
    for save_every in (1, 3):
        name = f"save_every_{save_every}"
        kills = live(folder, name, {**layout, "save_every": save_every}, random.Random(args.seed + save_every), args.kills)
        final = [(folder / run / "rwkv-final.pth").read_bytes() for run in ("whole", name)]
        rows.append({
            "save_every": save_every, "kills": len(kills), "of them in a save": sum(kill["in a save"] for kill in kills),
            "same bytes of rwkv-final.pth": final[0] == final[1],
            "same metrics.jsonl": records(folder / name) == records(folder / "whole"), "each": kills,
        })  # fmt: skip
        print({key: value for key, value in rows[-1].items() if key != "each"})
    return rows


def live(folder: Path, name: str, changes: dict, chance: random.Random, n_kills: int) -> list[dict]:
    """Lives until the run's end; each of the first n_kills is killed some steps after its start, every other one in a save."""
    out: Path = folder / name
    kills: list[dict] = []
    while not (out / "rwkv-final.pth").exists():
        process, begin = start(folder, name, changes), None
        n_steps, wants_save = chance.randint(1, 5), len(kills) % 2 == 1
        while process.poll() is None:
            n = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
            begin = n if begin is None or n < begin else begin
            in_save = any((out / "last").glob(".*.part"))
            if len(kills) < n_kills and n - begin >= n_steps and (in_save or not wants_save):
                time.sleep(0 if wants_save else chance.uniform(0, 0.05))
                kills.append({"after step": n, "in a save": any((out / "last").glob(".*.part"))})
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.0005)
        if process.wait() not in (0, -signal.SIGKILL):
            sys.exit(f"a life of {name} failed")
    return kills


def write_data(folder: Path) -> None:
    shape = ModelShape(2, 64, 64, 224, 512, head_size=32)
    model = empty_model(shape, choose_backend("5", "chunked", torch.device("cpu")).wkv, torch.float32)
    init_weights(model, 1e-3, 0)
    save_weights(model.state_dict(), folder / "model.pth")
    rng = np.random.default_rng(0)
    rng.integers(1, 512, 20_000).astype("<u2").tofile(folder / "corpus.bin")
    pairs = [tuple(rng.integers(1, 512, n) for n in rng.integers(2, 40, 3)) for _ in range(100)]
    save_pairs(folder / "train.save", pack_pairs(pairs, np.full((100, 2), -100.0)))


def start(folder: Path, name: str, changes: dict) -> subprocess.Popen:
    """Two epochs of 40 steps of 2 micro-batches, with dropout."""
    values = {
        "load_model": folder / "model.pth", "proj_dir": folder / name, "data_file": folder / "corpus.bin", "data_type": "uint16",
        "ctx_len": 32, "dpo_train_file": folder / "train.save", "dpo_general_corpus_ratio": 0.5, "accelerator": "cpu",
        "precision": "fp32", "epoch_steps": 80, "epoch_count": 2, "accumulate_grad_batches": 2, "micro_bsz": 2, "lr_init": 1e-3,
        "lr_final": 1e-4, "dropout": 0.1, "weight_decay": 0.1, "enable_progress_bar": False, "wkv_backend": "chunked", **changes,
    }  # fmt: skip
    flags = [part for flag, value in values.items() for part in (f"--{flag}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(ROOT / "RWKV-v5" / "train.py"), *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


if __name__ == "__main__":
    main()
