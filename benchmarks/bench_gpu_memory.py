#!/usr/bin/env python3
"""Peaks of the GPU allocator in training runs of a 0.4B model (L24 D1024, 65,536 tokens of vocabulary) beside what --dry_run says, on
a GPU that is not there (tests/fake_gpu.py), into results/memory_fake_gpu.json.

    python benchmarks/bench_gpu_memory.py                        every configuration, two steps each; ten minutes
    python benchmarks/bench_gpu_memory.py --parts "stage 2" ...  some
    python benchmarks/bench_gpu_memory.py --markdown             the table of docs/memory.md, from what was recorded

A micro-batch is one window of 4,096 tokens and one pair of 256/200/150, in bf16. What the allocator counts is exact, for torch and
DeepSpeed allocate as on a GPU; its kernels don't run.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "RWKV-v5"), str(ROOT / "RWKV-v5" / "src"), str(ROOT / "tests"), str(Path(__file__).parent)]

from conftest import random_model  # noqa: E402 (the path above holds what follows)
from fake_gpu import run_on_fake_gpu, unusable_because  # noqa: E402
from measure import RESULTS, make_pairs, save  # noqa: E402
from runs import flags  # noqa: E402
from rwkv_dpo.data.pair_files import save_pairs  # noqa: E402
from rwkv_dpo.data.pairs import pack_pairs  # noqa: E402
from rwkv_dpo.model.checkpoint import save_weights  # noqa: E402
from rwkv_dpo.model.shape import ModelShape  # noqa: E402

LENGTHS, CTX, VOCAB = (256, 200, 150), 4096, 65536
Flags = dict[str, object]
CP: Flags = {"grad_cp": 1}
LORA: Flags = {"grad_cp": 1, "peft": "lora"}
STATE: Flags = {"chunk_ctx": 512, "peft": "state"}
STAGE_2: Flags = {"strategy": "deepspeed_stage_2"}
CONFIGURATIONS: dict[str, Flags] = {
    "no flag": {}, "grad_cp": CP, "LoRA r=32, grad_cp": LORA, "state tuning, chunk_ctx 512": STATE,
    "stage 1, grad_cp": {"strategy": "deepspeed_stage_1", **CP},
    "stage 2": STAGE_2, "stage 2, grad_cp": {**STAGE_2, **CP}, "stage 2, grad_cp, accumulated": {
        **STAGE_2, **CP, "accumulate_grad_batches": 2, "epoch_steps": 4},
    "stage 2, LoRA r=32, grad_cp": {**STAGE_2, **LORA}, "stage 2, state tuning, chunk_ctx 512": {**STAGE_2, **STATE},
    "stage 2, offload, grad_cp": {"strategy": "deepspeed_stage_2_offload", **CP},
    "stage 3, grad_cp": {"strategy": "deepspeed_stage_3", **CP},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=24)
    parser.add_argument("--n_embd", type=int, default=1024)
    parser.add_argument("--parts", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/memory.md and measure nothing")
    parser.add_argument("--dont_save", action="store_true")
    args = parser.parse_args()
    if args.markdown:
        print(markdown())
        return
    if unusable_because():
        sys.exit(unusable_because())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, ModelShape(args.n_layer, args.n_embd, args.n_embd, int(args.n_embd * 3.5) // 32 * 32, VOCAB))
        for part in args.parts:
            row = measure(folder, CONFIGURATIONS[part])
            print(part, json.dumps(row), flush=True)
            if not args.dont_save:
                save("memory_fake_gpu", {part: row})


def write_data(folder: Path, shape: ModelShape) -> None:
    """A checkpoint in bf16 as the official ones are, a corpus, and pairs."""
    rng = np.random.default_rng(0)
    weights = random_model(shape, torch.float32).state_dict()
    save_weights({name: weight.bfloat16() for name, weight in weights.items()}, folder / "model.pth")
    rng.integers(1, shape.vocab_size, 200_000).astype("<u2").tofile(folder / "corpus.bin")
    save_pairs(folder / "train.save", pack_pairs(make_pairs(LENGTHS, 4, shape.vocab_size), np.full((4, 2), -2000.0)))


def measure(folder: Path, changes: dict[str, object]) -> dict[str, object]:
    own = {"accelerator": "gpu", "precision": "bf16", "ctx_len": CTX, "micro_bsz": 1, "epoch_steps": 2, "epoch_count": 1, "epoch_save": 0}
    run = flags(folder, folder / "out", **{**own, "wkv_backend": "cuda", "overwrite": 1, "resume": "none", **changes})
    (folder / "runs.json").write_text(json.dumps({"run": run}))
    done = run_on_fake_gpu(ROOT / "tests" / "peaks_on_fake_gpu.py", folder / "runs.json", folder / "logs")
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    result = json.loads(done.stdout.splitlines()[-1])["run"]
    if "fault" in result:
        sys.exit(result["fault"])
    estimate = sum(result["estimated"].values())
    return {
        "flags": changes, "ctx_len": CTX, "peak GB": result["measured"] / 1e9, "estimate GB": estimate / 1e9,
        "estimate / measured": estimate / result["measured"],
        "estimated parts GB": {part: n_bytes / 1e9 for part, n_bytes in result["estimated"].items()},
    }  # fmt: skip


def markdown() -> str:
    """The table of what was recorded, in the order of CONFIGURATIONS."""
    parts = json.loads((RESULTS / "memory_fake_gpu.json").read_text())
    rows = ["| 0.4B, one GPU, micro_bsz 1, bf16 | peak GB | `--dry_run` says |", "|---|---|---|"]
    for name, changes in CONFIGURATIONS.items():
        if name in parts:
            row = parts[name]["measured"]
            label = " ".join(f"`--{flag} {value}`" for flag, value in changes.items() if flag != "epoch_steps") or "no flag"
            rows.append(f"| {label} | {row['peak GB']:.2f} | {row['estimate GB']:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
