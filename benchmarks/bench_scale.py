#!/usr/bin/env python3
"""Two processes against one, a thread each, through train.py itself, into benchmarks/results/scale_cpu_L<n>_D<n>.json.

    python benchmarks/bench_scale.py [--n_layer 6] [--n_embd 512] [--steps 6] [--parts scaling strategies balance]

The parity test runs first, and when it fails nothing is measured. Runs take turns. Every process has pairs of 256/200/150 tokens
and windows of 512, --micro_bsz of each.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "RWKV-v5" / "src"), str(Path(__file__).parent)]

import numpy as np  # noqa: E402 (the path above makes the package importable without installing it)
from bench_step import report  # noqa: E402 (as above)
from measure import make_pairs, save  # noqa: E402 (as above)
from original_way import build  # noqa: E402 (as above)
from rwkv_dpo.batches.sampling import LengthOrder, global_index, item_at  # noqa: E402 (as above)
from rwkv_dpo.data.pair_files import save_pairs  # noqa: E402 (as above)
from rwkv_dpo.data.pairs import pack_pairs  # noqa: E402 (as above)
from rwkv_dpo.model.checkpoint import save_weights  # noqa: E402 (as above)
from rwkv_dpo.model.shape import ModelShape  # noqa: E402 (as above)

# The first steps fill the heap and the optimizer's state.
WARMUP = 2
THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=6)
    parser.add_argument("--n_embd", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--micro_bsz", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=6, help=f"optimizer steps of a run, of which the first {WARMUP} don't count")
    parser.add_argument("--repeats", type=int, default=1, help="how often each run is made")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    tests = ["-q", "tests/training/test_many_processes.py", "-k", "ddp"]
    if subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env={**os.environ, **THREAD}).returncode:
        sys.exit("two processes do not train as one; nothing was timed")
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        write_data(args)
        for name in args.parts:
            measured = {"load_average_before": round(os.getloadavg()[0], 2), "table": PARTS[name](args)}
            save(f"scale_cpu_L{args.n_layer}_D{args.n_embd}", {name: measured})


def write_data(args: argparse.Namespace) -> None:
    shape = ModelShape(args.n_layer, args.n_embd, args.n_embd, int(args.n_embd * 3.5) // 32 * 32, args.vocab_size)
    model = build("forest", shape, "fp32", "auto", torch.device("cpu"))
    args.n_parameters = sum(p.numel() for p in model.parameters())
    save_weights(model.state_dict(), args.folder / "model.pth")
    save_pairs(args.folder / "train.save", pack_pairs(make_pairs((256, 200, 150), 64, args.vocab_size), np.full((64, 2), -2000.0)))
    np.random.default_rng(0).integers(1, args.vocab_size, 100_000).astype("<u2").tofile(args.folder / "corpus.bin")


def measure_run(args: argparse.Namespace, **changes: object) -> list[float]:
    """tokens/s of each step of a run after the warm-up, as metrics.jsonl has them."""
    accumulate = int(str(changes.get("accumulate_grad_batches", 1)))
    with tempfile.TemporaryDirectory(dir=args.folder) as out:
        values = {
            "load_model": args.folder / "model.pth", "proj_dir": out, "data_file": args.folder / "corpus.bin", "data_type": "uint16",
            "ctx_len": 512, "dpo_train_file": args.folder / "train.save", "dpo_general_corpus_ratio": 0.5, "accelerator": "cpu",
            "precision": args.precision, "epoch_steps": args.steps * accumulate, "epoch_count": 1, "epoch_save": 0,
            "micro_bsz": args.micro_bsz, "lr_init": 1e-5, "enable_progress_bar": False, **changes,
        }  # fmt: skip
        flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / "RWKV-v5" / "train.py"), *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **THREAD})
        records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [r["tokens_per_s"] for r in records[WARMUP:]]


def compare(args: argparse.Namespace, runs: dict[str, dict]) -> dict[str, float]:
    """Median tokens/s of each run, the runs taking turns."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, changes in runs.items():
            rates[name] += measure_run(args, **changes)
    return {name: median(values) for name, values in rates.items()}


def scaling(args: argparse.Namespace) -> list[dict]:
    """ddp, with and without accumulation: accumulated micro-batches share one exchange of gradients."""
    rows = []
    for accumulate in (1, 4):
        settings = {"accumulate_grad_batches": accumulate}
        rates = compare(args, {"1 process": settings, "2 processes": {**settings, "devices": 2, "strategy": "ddp"}})
        rows.append(report({
            "million parameters": args.n_parameters / 1e6, "vocabulary": args.vocab_size, "micro_bsz": args.micro_bsz,
            "precision": args.precision, "accumulate": accumulate, **{f"{name} tokens/s": rate for name, rate in rates.items()},
            "speedup": rates["2 processes"] / rates["1 process"],
        }))  # fmt: skip
    return rows


def strategies(args: argparse.Namespace) -> list[dict]:
    names = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
    rates = compare(args, {name: {"devices": 2, "strategy": name} for name in names})
    return [report({"strategy": name, "2 processes tokens/s": rate}) for name, rate in rates.items()]


def balance(args: argparse.Namespace) -> list[dict]:
    """By how much the slowest rank's tokens exceed the ranks' mean, over three passes of log-normally long pairs."""
    generator = random.Random(5)
    lengths = [1 + int(generator.lognormvariate(5, 0.8)) for _ in range(4999)]
    order, rows = LengthOrder(lengths, 1), []
    for world_size in (2, 4):
        for micro_bsz in (1, 4):
            row: dict = {"ranks": world_size, "micro_bsz": micro_bsz}
            for name in ("none", "tokens"):
                excesses = []
                for step in range(3 * len(lengths) // (world_size * micro_bsz)):
                    tokens = []
                    for rank in range(world_size):
                        indices = [global_index(step, slot, rank, world_size, micro_bsz) for slot in range(micro_bsz)]
                        plain = [item_at(i, len(lengths), 1) for i in indices]
                        items = plain if name == "none" else order.dealt(step, world_size, micro_bsz)[rank]
                        tokens.append(sum(lengths[item] for item in items))
                    excesses.append(max(tokens) / mean(tokens) - 1)
                row |= {f"{name} mean %": 100 * mean(excesses), f"{name} p95 %": 100 * sorted(excesses)[int(0.95 * len(excesses))]}
            rows.append(report(row))
    return rows


PARTS = {"scaling": scaling, "strategies": strategies, "balance": balance}


if __name__ == "__main__":
    main()
