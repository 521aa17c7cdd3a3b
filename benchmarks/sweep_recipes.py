#!/usr/bin/env python3
"""The values of --recipe, by held-out figures of runs on the demo's data, into benchmarks/results/recipes_demo.json.

    python benchmarks/sweep_recipes.py FOLDER [--parts dpo lora state pretrain]

FOLDER keeps the demo's base model, its pairs and every run; runs that are finished there are not made again. The base model has seen the
whole corpus, so that for preference runs the corpus loss says what is forgotten.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "RWKV-v5" / "src"), str(Path(__file__).parent)]

import numpy as np  # noqa: E402 (the path above makes the package importable without installing it)
from measure import save  # noqa: E402 (as above)
from rwkv_dpo.data.binidx import read_binidx  # noqa: E402 (as above)
from rwkv_dpo.evaluation.divergence import score_windows  # noqa: E402 (as above)
from rwkv_dpo.model.checkpoint import load_model  # noqa: E402 (as above)
from rwkv_dpo.run_folder.contents import saved_name  # noqa: E402 (as above)
from rwkv_dpo.tuning.tuning import load_tuned  # noqa: E402 (as above)

CORPUS = ROOT / "default_text_document"
SHARED: dict[str, Any] = {
    "vocab_size": 65536, "ctx_len": 256, "accelerator": "cpu", "precision": "fp32", "random_seed": 1, "epoch_save": 0, "micro_bsz": 4,
    "enable_progress_bar": False,
}  # fmt: skip
SHAPE = {"n_layer": 4, "n_embd": 128}
PASSES = 3  # over the pairs, each evaluated: 336 pairs are 84 micro-batches
PREFERENCE: dict[str, Any] = {
    "data_file": CORPUS, "dpo_beta": 0.1, "dpo_general_corpus_ratio": 0.8, "epoch_steps": 84, "epoch_count": PASSES, "warmup_steps": 10,
    "valid_data_file": CORPUS, "eval_windows": 64, "eval_every": 42,
}  # fmt: skip
# What the learning rate falls to, as a share.
FALLS_TO = 0.2

RUNS: dict[str, list[dict[str, Any]]] = {
    "dpo": [
        *({"lr_init": lr} for lr in (1e-4, 2.5e-4, 5e-4, 1e-3)),
        *({"lr_init": 2.5e-4, "dpo_beta": beta} for beta in (0.03, 0.3)),
        {"lr_init": 2.5e-4, "dpo_general_corpus_ratio": 0.5},
        *({"lr_init": lr, "dpo_general_corpus_ratio": 0.0} for lr in (2.5e-5, 5e-5, 2.5e-4)),
    ],
    "lora": [{"peft": "lora", "lr_init": lr} for lr in (5e-4, 1e-3, 2e-3, 4e-3)],
    "state": [{"peft": "state", "lr_init": lr} for lr in (1e-2, 1e-1, 1.0, 10.0)],
    "pretrain": [{"lr_init": lr} for lr in (6e-4, 1.5e-3, 3e-3, 6e-3)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.folder)
    for part in args.parts:
        save("recipes_demo", {part: [measured(args.folder, part, changes) for changes in RUNS[part]]})


def prepare(folder: Path) -> None:
    """The demo's base model and pairs, and its corpus without, and of, the last tenth."""
    base = folder / "base" / "rwkv-final.pth"
    run("train.py", **SHARED, **SHAPE, data_file=CORPUS, dpo=0, proj_dir=folder / "base", epoch_steps=60, epoch_count=5, lr_init=3e-3,
        lr_final=3e-4, warmup_steps=20)  # fmt: skip
    if not (folder / "pairs" / "testset.save").exists():
        run("prepare_pairs.py", source=ROOT / "RWKV-v5/demo/preferences.jsonl", load_model=base, out_dir=folder / "pairs", overwrite=1,
            templates="chat", ctx_len=256, valid_ratio=0.1, test_ratio=0.2, device="cpu")  # fmt: skip
    tokens = np.asarray(read_binidx(CORPUS).tokens)
    cut = len(tokens) * 9 // 10
    for name, part in (("most", tokens[:cut]), ("rest", tokens[cut:])):
        np.save(folder / f"{name}.npy", part)


def measured(folder: Path, part: str, changes: dict[str, Any]) -> dict[str, Any]:
    """A run's flags, and what it measured on the way."""
    name = part + "".join(f"_{value}" for value in changes.values())
    flags: dict[str, Any] = {**SHARED, "proj_dir": folder / name, "lr_final": FALLS_TO * changes["lr_init"]}
    if part == "pretrain":
        flags |= {**SHAPE, "data_file": folder / "most.npy", "dpo": 0, "epoch_steps": 60, "epoch_count": 5, "warmup_steps": 20,
                  "valid_data_file": folder / "rest.npy"}  # fmt: skip
    else:
        flags |= {**PREFERENCE, "load_model": folder / "base" / "rwkv-final.pth", "dpo_train_file": folder / "pairs" / "trainset.save",
                  "dpo_valid_file": folder / "pairs" / "validset.save"}  # fmt: skip
    run("train.py", **flags | changes)
    records = [json.loads(line) for line in (folder / name / "valid.jsonl").read_text().splitlines()]
    shown = ("step", "loss_dpo", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected", "corpus_loss")
    curve = [{key: round(record[key], 5) for key in shown if key in record} for record in records]
    found: dict[str, Any] = {"flags": changes, "evaluations": curve}
    if part != "pretrain":
        found["kl"] = round(divergence(folder, folder / name / saved_name(changes.get("peft", "none"), "final")), 5)
    print(part, changes, found.get("kl"), curve[-1], flush=True)
    return found


def divergence(folder: Path, trained: Path) -> float:
    """KL(trained || base), nats a token, on the windows that the run was evaluated on."""
    path = str(folder / "base" / "rwkv-final.pth")
    device = torch.device("cpu")
    is_whole = trained.name.startswith("rwkv")
    base, model = (load_model(one, device=device, compute_dtype=torch.float32) for one in (path, str(trained) if is_whole else path))
    if not is_whole:
        load_tuned(model, str(trained), path, any_base=False)
    tokens, ctx_len = read_binidx(CORPUS).tokens, SHARED["ctx_len"]
    starts = range(0, PREFERENCE["eval_windows"] * ctx_len, ctx_len)
    windows = (np.asarray(tokens[start : start + ctx_len + 1], np.int64) for start in starts)
    return float(score_windows(model, windows, 8192, base).divergences.mean())


def run(script: str, **flags: Any) -> None:
    """A script of ours; a finished run of train.py ends at once."""
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    command: list[str | Path] = [sys.executable, ROOT / "RWKV-v5" / script, *arguments]
    subprocess.run(command, check=True, env={**os.environ, "OMP_WAIT_POLICY": "passive"})


if __name__ == "__main__":
    main()
