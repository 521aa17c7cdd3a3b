#!/usr/bin/env python3
"""Speed and memory of a training step: ours against the original's way, written out here.

The original's way (original_way.py): a batch-1 forward of prompt + answer for each answer, full logits, every activation kept by
autograd. The WKV backend is the same.

    python benchmarks/bench_step.py        everything, about twenty minutes on 2 cores; writes benchmarks/results/step_*.json
    python benchmarks/bench_step.py --version 7 --parts pairs memory
    python benchmarks/bench_step.py --n_layer 24 --n_embd 1024 --device cuda

Parity comes first: losses and gradients of both ways have to agree, or nothing is timed. "tuned" is a process with the memory
and matrix-product settings that train.py makes on a CPU; "stock" one with torch's defaults, as the original would run.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "RWKV-v5" / "src"))

from measure import Products, Recurrences, alternate, machine, make_pairs, save
from original_way import BETA, DTYPES, RATIO, build, original_loss, score_original
from rwkv_dpo.batches.micro_batch import MicroBatch, collate
from rwkv_dpo.data.pairs import Pair, PairSet, pack_pairs
from rwkv_dpo.data.trees import grow
from rwkv_dpo.devices.device import tune_cpu
from rwkv_dpo.evaluation.scoring import score_pairs
from rwkv_dpo.model.linear import refresh_casts
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.objective.objective import objective

MICRO_BSZ, WINDOW = 4, 1024
# The heap settles after a few steps; what a run of thousands sees is what comes after.
WARMUP = 4
CASES = {"256/200/150": (256, 200, 150), "512/128/128": (512, 128, 128)}


def check_parity(backend: str, device: torch.device, version: str = "5") -> None:
    """Both ways on a small model in fp32: the loss to 1e-5, every gradient to 1e-3 (fp32 rounding over two layers)."""
    shape = ModelShape(2, 128, 128, 448, 512, version=version)
    pairs, windows, refs = make_pairs((20, 17, 9), 3, 512), [make_pairs((65, 1, 1), 1, 512)[0][0]], np.full((3, 2), -50.0)
    original, forest = build("original", shape, "fp32", backend, device), build("forest", shape, "fp32", backend, device)
    losses, grads = [], []
    for model, loss in (
        (original, original_loss(original, windows, pairs, refs)),
        (forest, objective(forest, collate(windows, pairs, refs).to(device), dpo(BETA), RATIO)[0]),
    ):
        losses.append(loss.item())
        grads.append(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, allow_unused=True))
    worst = max(float((a - b).norm() / a.norm().clamp(min=1e-6)) for a, b in zip(*grads, strict=True))
    if abs(losses[0] / losses[1] - 1) > 1e-5 or worst > 1e-3:
        sys.exit(f"the two ways disagree: losses {losses}, worst gradient {worst:.1e}; nothing was timed")
    print(f"parity: losses {losses[0]:.6f} and {losses[1]:.6f}, worst gradient difference {worst:.1e}")


def ours(model: RWKV, batch: MicroBatch) -> None:
    ratio = RATIO if batch.n_windows and batch.step.n_pairs else float(batch.n_windows > 0)
    objective(model, batch, dpo(BETA), ratio)[0].backward()


def theirs(model: RWKV, windows: list[np.ndarray], pairs: list[Pair], refs: np.ndarray) -> None:
    original_loss(model, windows, pairs, refs).backward()


def step_of(model: RWKV, way: Callable[..., None], *data: object) -> Callable[[], None]:
    """One way's forward and backward; gradients are dropped afterwards, as between the steps of a run."""

    def run() -> None:
        way(model, *data)
        model.zero_grad(set_to_none=True)

    return run


def time_pairs(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Forward and backward of a micro-batch of pairs, alone and with a corpus window."""
    rows = []
    models = {f"{way} {p}": build(way, args.shape, p, args.wkv_backend, device) for p in DTYPES for way in ("original", "forest")}
    for case in args.cases:
        lengths = CASES[case]
        pairs, refs = make_pairs(lengths, MICRO_BSZ, args.shape.vocab_size), np.full((MICRO_BSZ, 2), -2000.0)
        for n_windows in (0, 1):
            windows = [make_pairs((WINDOW + 1, 1, 1), 1, args.shape.vocab_size)[0][0]] * n_windows
            batch = collate(windows, pairs, refs).to(device)
            runs = {}
            for p in DTYPES:
                runs[f"original {p}"] = step_of(models[f"original {p}"], theirs, windows, pairs, refs)
                runs[f"forest {p}"] = step_of(models[f"forest {p}"], ours, batch)
            seconds = alternate(runs, args.repeats, WARMUP // 4)
            row = {"pairs": case, "window": WINDOW * n_windows, **{f"{name} ms/pair": 1000 * s / MICRO_BSZ for name, s in seconds.items()}}
            row["speedup fp32"] = seconds["original fp32"] / seconds["forest fp32"]
            row["speedup bf16"] = seconds["original bf16"] / seconds["forest bf16"]
            rows.append(report(row))
    return rows


def time_scoring(args: argparse.Namespace, device: torch.device) -> dict:
    """Reference log-probabilities of a pair file: packed by tokens, against two full forwards a pair."""
    pairs = make_pairs(CASES["256/200/150"], 2 * MICRO_BSZ, args.shape.vocab_size)
    packed = pack_pairs(pairs)
    runs: dict[str, Callable[[], object]] = {}
    for p in DTYPES:
        model = build("forest", args.shape, p, args.wkv_backend, device)
        runs[f"original {p}"] = partial(score_original, model, pairs)
        runs[f"forest {p}"] = partial(score_pairs, model, packed, 4096)
    seconds = alternate(runs, args.repeats, WARMUP)
    return report({
        **{f"{name} ms/pair": 1000 * s / len(pairs) for name, s in seconds.items()},
        "speedup fp32": seconds["original fp32"] / seconds["forest fp32"],
        "speedup bf16": seconds["original bf16"] / seconds["forest bf16"],
    })  # fmt: skip


def ranking(vocab_size: int) -> PairSet:
    """All six pairs of four answers of 150 tokens to a prompt of 256, as a tree."""
    prompt, *answers = (row for pair in make_pairs((256, 150, 150), 2, vocab_size) for row in pair)
    answers = [answers[0], answers[1], *answers[3:]]
    pairs = [(prompt, answers[i], answers[j]) for i in range(4) for j in range(i + 1, 4)]
    return grow(pack_pairs(pairs, np.full((6, 2), -2000.0)), 10_000).pairs


def batch_of_ranking(pairs: PairSet, numbers: range) -> MicroBatch:
    return collate([], [pairs.pair(i) for i in numbers], pairs.ref_logps[numbers], trees=[range(len(numbers))])


def time_trees(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A ranking's six pairs as one sample against the same pairs one by one, each as a forest: forward and backward, whole steps with
    clipping and AdamW, reference scoring; and the memory of a sample above weights and gradients, a pair."""
    pairs, rows = ranking(args.shape.vocab_size), []
    tree, single = [range(6)], [range(i, i + 1) for i in range(6)]
    for p in DTYPES:
        model = build("forest", args.shape, p, args.wkv_backend, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def train(samples: list[range], step: bool, model: RWKV = model, optimizer: torch.optim.AdamW = optimizer) -> Callable[[], None]:
            batches = [batch_of_ranking(pairs, numbers).to(device) for numbers in samples]

            def run() -> None:
                for batch in batches:
                    ours(model, batch)
                    if step:
                        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                        optimizer.step()
                        refresh_casts(model)
                        optimizer.zero_grad(set_to_none=True)
                model.zero_grad(set_to_none=True)

            return run

        def score(samples: list[range], model: RWKV = model) -> Callable[[], object]:
            sets = [pairs.select(numbers) for numbers in samples]
            return lambda: [score_pairs(model, each, 4096) for each in sets]

        jobs = {"gradients": (train(tree, False), train(single, False)), "steps": (train(tree, True), train(single, True)),
                "scoring": (score(tree), score(single))}  # fmt: skip
        for job, (together, one_by_one) in jobs.items():
            seconds = alternate({"tree": together, "pairs": one_by_one}, args.repeats, WARMUP // 4)
            row: dict = {"job": job, "precision": p, **{f"{name} ms/pair": 1000 * s / 6 for name, s in seconds.items()}}
            rows.append(report(row | {"pairs/s, tree / pairs": seconds["pairs"] / seconds["tree"]}))
        megabytes = {name: _child("memory", "forest", p, "lean", name) for name in ("tree", "pair of the tree")}
        row = {"job": "memory", "precision": p, "tree MB": megabytes["tree"], "pair MB": megabytes["pair of the tree"]}
        rows.append(report(row | {"MB a pair, tree / pairs": megabytes["tree"] / 6 / megabytes["pair of the tree"]}))
    return rows


def time_language_model(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A whole step (forward, backward, AdamW) on one window, against the rate of a large matrix product in the same process, and against
    the step's own matrix products and recurrences, each alone."""
    return [report(_child("language_model", "forest", precision, "tuned", "")) for precision in DTYPES]


def language_model_child(args: argparse.Namespace, model: RWKV, precision: str) -> dict:
    s, device = args.shape, model.head.weight.device
    n_square = 4 if s.version == "7" else 6  # matrices [n_embd, n_embd] of a block; 6 and 7 have thin ones beside
    n_matrix = s.n_layer * (n_square * s.n_embd**2 + 2 * s.n_embd * s.dim_ffn) + s.n_embd * s.vocab_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    batch = collate([make_pairs((WINDOW + 1, 1, 1), 1, s.vocab_size)[0][0]], [], np.zeros((0, 2))).to(device)
    square = torch.randn(2048, 2048, dtype=DTYPES[precision], device=device)

    def step() -> None:
        objective(model, batch, dpo(BETA), 1.0)[0].backward()
        optimizer.step()
        refresh_casts(model)
        optimizer.zero_grad(set_to_none=True)

    wkv = model.wkv
    model.wkv = recurrences = Recurrences(wkv)
    with Products() as products:
        step()
    model.wkv = wkv
    runs: dict[str, Callable[[], object]] = {"step": step, "gemm": lambda: [square @ square for _ in range(10)]}
    runs |= {"products": products.run, "recurrences": recurrences.run}
    seconds = alternate(runs, 3 * args.repeats, WARMUP)
    gemm_rate, rate = 10 * 2 * 2048**3 / seconds["gemm"], 6 * n_matrix * WINDOW / seconds["step"]
    return {
        "precision": precision, "tokens/s": WINDOW / seconds["step"], "step ms": 1000 * seconds["step"], "GFLOP/s": rate / 1e9,
        "GEMM GFLOP/s": gemm_rate / 1e9, "share of the GEMM rate": rate / gemm_rate,
        "products": len(products.calls), "products / step": seconds["products"] / seconds["step"],
        "recurrences": len(recurrences.calls), "recurrences / step": seconds["recurrences"] / seconds["step"],
    }  # fmt: skip


def time_recomputing(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """What --grad_cp and --chunk_ctx cost in time: forward and backward of one window and one pair."""
    windows = [make_pairs((WINDOW + 1, 1, 1), 1, args.shape.vocab_size)[0][0]]
    pairs, refs = make_pairs(CASES["256/200/150"], 1, args.shape.vocab_size), np.full((1, 2), -2000.0)
    rows = []
    for p in DTYPES:
        runs = {}
        for grad_cp, chunk_ctx in (("0", 0), ("selective", 0), ("1", 0), ("0", 256)):
            model = build("forest", args.shape, p, args.wkv_backend, device, grad_cp)
            batch = collate(windows, pairs, refs, chunk_ctx).to(device)
            runs[f"chunk_ctx {chunk_ctx}" if chunk_ctx else f"grad_cp {grad_cp}"] = step_of(model, ours, batch)
        seconds = alternate(runs, args.repeats, WARMUP)
        row: dict = {"precision": p, **{f"{name} ms": 1000 * s for name, s in seconds.items()}}
        rows.append(report(row | {f"{name} / plain": s / seconds["grad_cp 0"] for name, s in seconds.items() if name != "grad_cp 0"}))
    return rows


def against_stock(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """With torch's default settings on the original's side: the original's way as it would run, in processes that take turns."""
    rows = []
    for job in ("256/200/150", "scoring"):
        times: dict[str, list[float]] = {name: [] for name in ("original fp32 stock", "forest fp32 stock", "forest bf16 tuned")}
        for _ in range(max(args.repeats // 2, 1)):
            for name, values in times.items():
                values.append(_child("time", *name.split(), job))
        seconds = {name: median(values) for name, values in times.items()}
        row = {"job": job, **{f"{name} ms/pair": 1000 * s / MICRO_BSZ for name, s in seconds.items()}}
        row["speedup fp32, stock both"] = seconds["original fp32 stock"] / seconds["forest fp32 stock"]
        row["speedup bf16 tuned against fp32 stock"] = seconds["original fp32 stock"] / seconds["forest bf16 tuned"]
        rows.append(report(row))
    return rows


def memory(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Peak memory above weights and gradients, each in a process of its own that gives freed memory back at once, so that it
    counts what is in use (--cpu_malloc 0)."""
    rows = []
    for case in args.cases:
        for precision in DTYPES:
            row: dict = {"pairs": case, "precision": precision}
            for way in ("original", "forest"):
                row[f"{way} MB"] = _child("memory", way, precision, "lean", case)
            row["forest / original"] = row["forest MB"] / row["original MB"]
            rows.append(report(row))
    return rows


def _child(*job: str) -> Any:
    command = [sys.executable, __file__, *sys.argv[1:], "--child", *job]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def child(args: argparse.Namespace, device: torch.device) -> Any:
    """One measurement in a process of its own, --child what way precision settings case: seconds, MB, or a row of results."""
    what, way, precision, settings, case = args.child
    if settings != "stock":
        tune_cpu(keep_memory=settings == "tuned")
    model = build(way, args.shape, precision, args.wkv_backend, device)
    if what == "language_model":
        return language_model_child(args, model, precision)
    pairs = make_pairs(CASES.get(case, CASES["256/200/150"]), MICRO_BSZ, args.shape.vocab_size)
    refs = np.full((MICRO_BSZ, 2), -2000.0)
    batch = collate([], pairs, refs).to(device)
    if "tree" in case:
        batch = batch_of_ranking(ranking(args.shape.vocab_size), range(6 if case == "tree" else 1)).to(device)

    def run() -> None:
        if case == "scoring":
            score_original(model, pairs) if way == "original" else score_pairs(model, pack_pairs(pairs), 4096)
        else:
            theirs(model, [], pairs, refs) if way == "original" else ours(model, batch)
            if what == "time":
                model.zero_grad(set_to_none=True)

    if what == "time":
        return alternate({way: run}, 2 if settings == "stock" else 4, 1 if settings == "stock" else WARMUP)[way]
    theirs(model, [], make_pairs((2, 2, 2), 1, args.shape.vocab_size), refs[:1])  # weights, gradients and code are in place
    before = _reset_peak(device)
    run()
    return (_peak(device) - before) / 1e6


def _reset_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def report(row: dict) -> dict:
    print("  ".join(f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()), flush=True)
    return row


PARTS = {
    "pairs": time_pairs,
    "recomputing": time_recomputing,
    "against_stock": against_stock,
    "scoring": time_scoring,
    "trees": time_trees,
    "language_model": time_language_model,
    "memory": memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--version", choices=["5", "6", "7"], default="5", help="of RWKV")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wkv_backend", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="of the parts pairs and memory")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    dim_ffn = 4 * args.n_embd if args.version == "7" else int(args.n_embd * 3.5) // 32 * 32
    args.shape = ModelShape(args.n_layer, args.n_embd, args.n_embd, dim_ffn, 65536, version=args.version)
    device = torch.device(args.device)
    if args.child:
        print(json.dumps(child(args, device)))
        return
    check_parity(args.wkv_backend, device, args.version)
    if device.type == "cpu":
        tune_cpu(keep_memory=True)
    print(machine())
    for name in args.parts:
        of_version = "" if args.version == "5" else f"_v{args.version}"
        save(f"step_{device.type}_L{args.n_layer}_D{args.n_embd}{of_version}", {name: PARTS[name](args, device)})


if __name__ == "__main__":
    main()
