#!/usr/bin/env python3
"""What --quant saves in LoRA runs of a 1.5B model (L24 D2048, 65,536 tokens of vocabulary), and what it costs, into results/quant.json.

    python benchmarks/bench_quant.py                    memory in each form, and the time of a step; ten minutes on 2 cores
    python benchmarks/bench_quant.py --parts memory     one of them
    python benchmarks/bench_quant.py --markdown         the table of docs/memory.md, from what was recorded

memory: the bytes of the base as a run holds it, counted; and the peak of the GPU's allocator in two steps of train.py on a GPU that is not
there (see bench_gpu_memory.py), beside what --dry_run says. A micro-batch is one window of --ctx_len tokens and one pair of 256/200/150, in
bf16, with --grad_cp 1.

time: seconds of a forward and backward pass of a smaller model (--time_shape: layers, width) on this CPU, forms in turn; gradients of
int8 and nf4 are first compared with those of a model whose matrices are what they hold.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import bench_gpu_memory as gpu  # puts tests/ and src/ on the path
import numpy as np
import torch
from conftest import random_model
from fake_gpu import unusable_because
from measure import RESULTS, alternate, save
from runs import flags
from rwkv_dpo.batches.micro_batch import collate
from rwkv_dpo.data.pair_files import save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.kernels.backends import choose_backend
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.quantized import FORMS, quantized
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.objective.objective import objective
from rwkv_dpo.run.flags import parse_flags
from rwkv_dpo.run.model import build_model, resolve_shape
from rwkv_dpo.tuning.adapters import add_adapter, plan_adapter
from rwkv_dpo.tuning.tuning import begin_tuning

# What the base may take of what it takes in bf16.
MARKS = {"none": 1.0, "int8": 0.65, "nf4": 0.45}
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n_layer", type=int, default=24)
    parser.add_argument("--n_embd", type=int, default=2048)
    parser.add_argument("--ctx_len", type=int, default=1024)
    parser.add_argument("--time_shape", type=int, nargs=2, default=(4, 1024))
    parser.add_argument("--parts", nargs="+", choices=("memory", "time"), default=("memory", "time"))
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/memory.md and measure nothing")
    parser.add_argument("--dont_save", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.markdown:
        print(markdown())
    elif args.child:
        {"data": write_data, "held": print_held}[args.child[0]](args, Path(args.child[1]))
    else:
        for part in args.parts:
            {"memory": memory, "time": times}[part](args)


def shape_of(n_layer: int, n_embd: int) -> ModelShape:
    return ModelShape(n_layer, n_embd, n_embd, int(n_embd * 3.5) // 32 * 32, gpu.VOCAB)


def keep(args: argparse.Namespace, part: str, row: dict[str, object]) -> None:
    print(part, json.dumps(row), flush=True)
    if not args.dont_save:
        save("quant", {part: row})


def memory(args: argparse.Namespace) -> None:
    """Runs in each form, bf16 first, of which the others are parts."""
    if unusable_because():
        sys.exit(unusable_because())
    plain: dict = {}
    with tempfile.TemporaryDirectory() as name:
        child(args, "data", Path(name))
        for form in MARKS:
            changes = {"grad_cp": 1, "peft": "lora", "ctx_len": args.ctx_len, "quant": form}
            held = int(child(args, "held", Path(name) / form))
            row: dict = gpu.measure(Path(name), changes) | {"ctx_len": args.ctx_len, "base GB": held / 1e9}
            plain = plain or row
            row |= {"base / bf16": row["base GB"] / plain["base GB"], "mark": MARKS[form], "peak / bf16": row["peak GB"] / plain["peak GB"],
                    "estimate / bf16": row["estimate GB"] / plain["estimate GB"]}  # fmt: skip
            keep(args, f"memory, {form}, L{args.n_layer} D{args.n_embd}", row)
            if row["base / bf16"] > MARKS[form]:
                sys.exit(f"{form}: the base takes {row['base / bf16']:.3f} of what it takes in bf16; the mark is {MARKS[form]}")


def child(args: argparse.Namespace, name: str, path: Path) -> str:
    """In a process of its own, whose memory goes with it; its last line."""
    sizes = ["--n_layer", str(args.n_layer), "--n_embd", str(args.n_embd)]
    command = [sys.executable, __file__, *sizes, "--child", name, str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.rpartition("\n")[0].rpartition("\n")[2]


def write_data(args: argparse.Namespace, folder: Path) -> None:
    """A checkpoint in bf16 as the official ones are, a corpus, and pairs."""
    model = random_model(shape_of(args.n_layer, args.n_embd), torch.bfloat16)
    save_weights(model.state_dict(), folder / "model.pth")
    np.random.default_rng(0).integers(1, gpu.VOCAB, 20_000).astype("<u2").tofile(folder / "corpus.bin")
    save_pairs(folder / "train.save", pack_pairs(gpu.make_pairs(gpu.LENGTHS, 4, gpu.VOCAB), np.full((4, 2), -2000.0)))
    print("written\n")


def print_held(args: argparse.Namespace, path: Path) -> None:
    """Bytes of all that a run doesn't train."""
    settings, given = parse_flags(flags(path.parent, path, precision="bf16", grad_cp=1, peft="lora", quant=path.name))
    model = build_model(settings, *resolve_shape(settings, given), CPU)
    begin_tuning(model, settings.tuning, given)
    print(sum(p.nbytes for p in model.parameters() if not p.requires_grad) + sum(matrix.nbytes for matrix in quantized(model).values()))


def adapted(shape: ModelShape, form: str) -> RWKV:
    wkv = choose_backend(shape.version, "cpu", CPU).wkv
    model = random_model(shape, torch.float32, wkv=wkv, grad_cp="1")
    model.compute_dtype = torch.bfloat16
    torch.manual_seed(0)
    add_adapter(model, plan_adapter(model, "lora", 32, 64, 0.0, "receptance,key,value,gate,output", "", ""), quant=form)
    return model


def times(args: argparse.Namespace) -> None:
    """Of steps in each form."""
    shape = shape_of(*args.time_shape)
    window = np.random.default_rng(0).integers(1, gpu.VOCAB, args.ctx_len + 1)
    batch = collate([window], gpu.make_pairs(gpu.LENGTHS, 1, gpu.VOCAB), np.full((1, 2), -2000.0))

    def step(model: RWKV) -> list[torch.Tensor]:
        trained = [p for p in model.parameters() if p.requires_grad]
        return list(torch.autograd.grad(objective(model, batch, dpo(0.1), 0.5)[0], trained))

    models = {form: adapted(shape, form) for form in MARKS}
    for form in FORMS:
        check(models[form], adapted(shape, "none"), step)
    seconds = alternate({form: partial(step, model) for form, model in models.items()}, repeats=5)
    keep(args, f"time, L{shape.n_layer} D{shape.n_embd}", {
        "ctx_len": args.ctx_len, "seconds": seconds, "of bf16": {form: each / seconds["none"] for form, each in seconds.items()},
    })  # fmt: skip


def check(model: RWKV, twin: RWKV, step: object) -> None:
    """Stops where gradients aren't those of a model whose matrices are what `model` holds. Rounding is the same."""
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, matrix in quantized(model).items():
            own[name].copy_(matrix.to(torch.bfloat16))
    for one, other in zip(step(model), step(twin), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def markdown() -> str:
    """The table of what was recorded."""
    parts = json.loads((RESULTS / "quant.json").read_text())
    rows = ["| 1.5B, LoRA, one GPU, bf16, ctx_len 1,024 | base GB | relative to bf16 | peak GB | `--dry_run` says | step time on a CPU |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    of_time = next(row["measured"]["of bf16"] for name, row in parts.items() if name.startswith("time"))
    for form in MARKS:
        row = next(row["measured"] for name, row in parts.items() if name.startswith(f"memory, {form}"))
        cells = (f"`--quant {form}`", *(f"{row[name]:.2f}" for name in ("base GB", "base / bf16", "peak GB", "estimate GB")))
        rows.append(f"| {' | '.join(cells)} | {of_time[form]:.2f}x |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
