#!/usr/bin/env python3
"""Peak memory of whole training runs of a 0.4B model (L24 D1024, 65,536 tokens of vocabulary), into results/memory_<device>.json.

    python benchmarks/bench_memory.py                        every configuration, two steps each; about half an hour on 2 cores
    python benchmarks/bench_memory.py --parts "grad_cp" ...  some
    python benchmarks/bench_memory.py --markdown             the table of docs/memory.md, from what was recorded

A micro-batch is one window of ctx_len tokens and one pair of 256/200/150, in bf16. Each configuration is train.py in a process of its
own, from a checkpoint to rwkv-final.pth: on a CPU its largest resident set less that of a process that only imports (--cpu_malloc 0, so
that it counts what is in use), on a GPU the allocator's peak. Beside it stands what --dry_run 1 says.

"original" is written out here: bf16 weights with fp32 master weights and Adam, two full forwards a pair, full logits of every sequence
and all activations alive until one backward. It runs at two contexts that fit (--original_ctx) and is extrapolated to 4,096 by the slope
between them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_step import check_parity, report
from measure import RESULTS, make_pairs, save
from original_way import BETA, RATIO, build, original_loss
from rwkv_dpo.data.pair_files import save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.devices.device import tune_cpu
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / "RWKV-v5" / "train.py"
LENGTHS, CTX, STEPS = (256, 200, 150), 4096, 2

# Flags of train.py by configuration, and the most GB it may take.
CONFIGURATIONS: dict[str, tuple[dict[str, object], float | None]] = {
    "plain": ({}, None),
    "grad_cp selective": ({"grad_cp": "selective"}, None),
    "grad_cp": ({"grad_cp": 1}, 9.5),
    "grad_cp, adamw_bf16state": ({"grad_cp": 1, "optim": "adamw_bf16state"}, None),
    "grad_cp, adamw8bit": ({"grad_cp": 1, "optim": "adamw8bit"}, None),
    "chunk_ctx 512": ({"chunk_ctx": 512}, None),
    "LoRA r=32, grad_cp": ({"peft": "lora", "lora_r": 32, "grad_cp": 1}, 2.5),
    "state tuning, chunk_ctx 512": ({"peft": "state", "chunk_ctx": 512}, 2.0),
    "state tuning, chunk_ctx 512, ctx 65,536": ({"peft": "state", "chunk_ctx": 512, "ctx_len": 65536}, None),
}
ORIGINAL = "original, extrapolated"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=24)
    parser.add_argument("--n_embd", type=int, default=1024)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--ctx_len", type=int, default=CTX, help="smaller for a trial of the benchmark itself")
    parser.add_argument("--original_ctx", type=int, nargs=2, default=(1024, 2048))
    parser.add_argument("--parts", nargs="+", choices=[ORIGINAL, *CONFIGURATIONS], default=[ORIGINAL, *CONFIGURATIONS])
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/memory.md and measure nothing")
    parser.add_argument("--dont_save", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = ModelShape(args.n_layer, args.n_embd, args.n_embd, int(args.n_embd * 3.5) // 32 * 32, 65536)
    if args.markdown:
        print(markdown(args.device))
        return
    if args.child:
        CHILDREN[args.child[0]](args, args.child[1])
        return
    check_parity("auto", torch.device(args.device))
    with tempfile.TemporaryDirectory() as folder:
        # In processes of their own: what this one holds would count as theirs until they have started.
        _run(_child(args, "data", folder))
        for name in args.parts:
            row = original(args) if name == ORIGINAL else configuration(args, Path(folder), name)
            report({"configuration": name, **{key: value for key, value in row.items() if key not in ("flags", "estimated parts GB")}})
            if not args.dont_save:
                save(f"memory_{args.device}", {name: {"load_average": round(os.getloadavg()[0], 2), **row}})


def configuration(args: argparse.Namespace, folder: Path, name: str) -> dict:
    """One run of train.py: GB by measurement and by estimate, seconds of its second step. A run that is refused says why."""
    changes, limit = CONFIGURATIONS[name]
    out = folder / name
    values = {
        "load_model": folder / "model.pth", "proj_dir": out, "data_file": folder / "corpus.bin", "data_type": "uint16",
        "ctx_len": args.ctx_len, "dpo_train_file": folder / "train.save", "dpo_general_corpus_ratio": RATIO, "dpo_beta": BETA,
        "precision": "bf16", "micro_bsz": 1, "epoch_steps": STEPS, "epoch_count": 1, "epoch_save": 0, "lr_init": 1e-6, "lr_final": 1e-6,
        "accelerator": args.device, "cpu_malloc": 0, "enable_progress_bar": False, **changes,
    }  # fmt: skip
    command = [sys.executable, str(TRAIN), *(part for flag, value in values.items() for part in (f"--{flag}", str(value)))]
    try:
        estimated = _run([*command, "--dry_run", "1"]).output
        run = _run(command)
    except Refused as refusal:
        return {"flags": changes, "refused": str(refusal)}
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    baseline = 0.0 if args.device == "cuda" else _run(_child(args, "imports", "")).peak_gb
    peak = records[-1]["peak_memory_gb"] if args.device == "cuda" else run.peak_gb - baseline
    parts = {key: float(value) for key, value in re.findall(r"^  (\w+) +([\d.]+)", estimated.split("with one flag")[0], re.MULTILINE)}
    estimate = parts.pop("together")
    return {
        "flags": changes, "ctx_len": values["ctx_len"], "peak GB": peak, "limit GB": limit, "estimate GB": estimate,
        "estimate / measured": estimate / peak, "seconds a step": records[-1]["tokens"] / records[-1]["tokens_per_s"],
        "process baseline GB": baseline, "estimated parts GB": parts,
    }  # fmt: skip


def original(args: argparse.Namespace) -> dict:
    """The original's way at two contexts, and by the line through them at ctx_len."""
    measured = [json.loads(_run(_child(args, "original", str(ctx))).output.splitlines()[-1]) for ctx in args.original_ctx]
    (a, b), (at_a, at_b) = args.original_ctx, measured

    def line(key: str) -> float:
        return at_b[key] + (at_b[key] - at_a[key]) / (b - a) * (args.ctx_len - b)

    return {
        "ctx_len": args.ctx_len, "peak GB": line("gb"), "seconds a step": line("seconds"), "extrapolated": True,
        **{f"measured GB at ctx {ctx}": m["gb"] for ctx, m in zip(args.original_ctx, measured, strict=True)},
    }  # fmt: skip


def original_child(args: argparse.Namespace, ctx_len: str) -> None:
    """Two steps of the original's way; prints GB above what imports take, and seconds of the second step."""
    device = torch.device(args.device)
    if device.type == "cpu":
        tune_cpu(keep_memory=False)
    before = peak_gb(device)
    model = build("original", args.shape, "bf16", "auto", device).bfloat16()
    masters = [p.detach().float() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-6, fused=True)
    pairs, windows = make_pairs(LENGTHS, 1, 65536), [make_pairs((int(ctx_len) + 1, 1, 1), 1, 65536)[0][0]]
    for _ in range(STEPS):
        start = time.perf_counter()
        original_loss(model, windows, pairs, np.full((1, 2), -2000.0)).backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
        seconds = time.perf_counter() - start
    print(json.dumps({"gb": peak_gb(device) - before, "seconds": seconds}))


def data_child(args: argparse.Namespace, folder: str) -> None:
    """A checkpoint in bf16 as the official ones are, a corpus, and pairs."""
    model = build("forest", args.shape, "bf16", "auto", torch.device("cpu"))
    save_weights({name: weight.bfloat16() for name, weight in model.state_dict().items()}, Path(folder) / "model.pth")
    save_pairs(Path(folder) / "train.save", pack_pairs(make_pairs(LENGTHS, 4, 65536), np.full((4, 2), -2000.0)))
    np.random.default_rng(0).integers(1, 65536, 200_000).astype("<u2").tofile(Path(folder) / "corpus.bin")


def imports_child(args: argparse.Namespace, _: str) -> None:
    """What every run has before it begins."""
    import rwkv_dpo.run.trainer  # noqa: F401 (to have it loaded)

    build("forest", ModelShape(1, 64, 64, 64, 64), "bf16", "auto", torch.device("cpu"))


CHILDREN = {"original": original_child, "data": data_child, "imports": imports_child}


class Refused(Exception):
    """train.py would not run with the flags; its line."""


class Run:
    def __init__(self, output: str, peak_gb: float) -> None:
        self.output, self.peak_gb = output, peak_gb


def _child(args: argparse.Namespace, name: str, argument: str) -> list[str]:
    sizes = ["--n_layer", str(args.n_layer), "--n_embd", str(args.n_embd), "--device", args.device]
    return [sys.executable, __file__, *sizes, "--child", name, argument]


def _run(command: list[str]) -> Run:
    """Runs it to its end: what it printed, and its largest resident set. Refused for status 2, which train.py ends with for its user's
    faults."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        errors.seek(0)
        code = os.waitstatus_to_exitcode(status)
        if code == 2:
            raise Refused(errors.read().strip().splitlines()[-1])
        if code:
            sys.exit(f"{' '.join(command)} ended with {code}:\n{errors.read()[-3000:]}")
        return Run(output.read(), usage.ru_maxrss * 1024 / 1e9)


def peak_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def markdown(device: str) -> str:
    """The table of what was recorded, in the order of CONFIGURATIONS."""
    parts = json.loads((RESULTS / f"memory_{device}.json").read_text())
    rows = ["| 0.4B, micro_bsz 1, bf16 | ctx_len | peak GB | `--dry_run` says | seconds per step |", "|---|---|---|---|---|"]
    for name in [ORIGINAL, *CONFIGURATIONS]:
        measured = parts.get(name, {}).get("measured", {})
        if "peak GB" not in measured:
            continue
        estimate = f"{measured['estimate GB']:.2f}" if "estimate GB" in measured else ""
        flags = " ".join(f"`--{flag} {value}`" for flag, value in measured.get("flags", {}).items() if flag != "ctx_len")
        label = flags or ("the original's way (extrapolated)" if name == ORIGINAL else "no flag")
        rows.append(f"| {label} | {measured['ctx_len']:,} | {measured['peak GB']:.2f} | {estimate} | {measured['seconds a step']:.0f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
