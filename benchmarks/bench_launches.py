#!/usr/bin/env python3
"""What the host asks of a GPU in one micro-batch of a 0.4B model (L24 D1024, 65,536 tokens of vocabulary; one window of 4,096 tokens and
one pair of about 256/200/150, bf16): launches, matrix products, copies, and waits for the device, by WKV backend, into
results/launches_fake_gpu.json. Counted on a GPU that is not there (tests/fake_gpu.py), whose kernels do nothing: counts are exact, times
are those of the host alone.

    python benchmarks/bench_launches.py                        each backend, three micro-batches after a first one; minutes, with nvcc
    python benchmarks/bench_launches.py --parts cuda --version 7 --dont_save
"""

import argparse
import ctypes
import importlib
import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "RWKV-v5" / "src"), str(ROOT / "tests"), str(Path(__file__).parent)]

from fake_gpu import run_on_fake_gpu, unusable_because  # noqa: E402 (the path above holds what follows)
from measure import make_pairs, save  # noqa: E402
from rwkv_dpo.batches.micro_batch import MicroBatch, collate  # noqa: E402
from rwkv_dpo.kernels.agreement import Agreement  # noqa: E402
from rwkv_dpo.kernels.backends import choose_backend  # noqa: E402
from rwkv_dpo.kernels.fused import cuda as fused  # noqa: E402
from rwkv_dpo.model.checkpoint import empty_model  # noqa: E402
from rwkv_dpo.model.shape import ModelShape  # noqa: E402
from rwkv_dpo.objective.losses import dpo  # noqa: E402
from rwkv_dpo.training.module import DPOModule  # noqa: E402

BACKENDS = ("cuda", "chunked")
LENGTHS, CTX, VOCAB = (256, 200, 150), 4096, 65536
# As the stand-in counts them, and what is a wait.
COUNTS = ("launches", "matrix products", "copies from the host", "copies to the host", "copies on the device", "fills",
          "waits for a stream", "waits for the device", "waits for an event")  # fmt: skip
WAITS = COUNTS[-3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", choices=["5", "6", "7"], default="5", help="of RWKV")
    parser.add_argument("--n_layer", type=int, default=24)
    parser.add_argument("--n_embd", type=int, default=1024)
    parser.add_argument("--parts", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--dont_save", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(measure(args.version, args.parts[0], args.n_layer, args.n_embd)))
        return
    if unusable_because():
        sys.exit(unusable_because())
    for part in args.parts:
        size = ("--version", args.version, "--n_layer", args.n_layer, "--n_embd", args.n_embd)
        done = run_on_fake_gpu(Path(__file__), "--inside", "--parts", part, *size)
        if done.returncode:
            sys.exit(done.stderr[-3000:])
        row = json.loads(done.stdout.splitlines()[-1])
        print(part, json.dumps(row, indent=1), flush=True)
        if not args.dont_save:
            save("launches_fake_gpu", {part if args.version == "5" else f"{part}, RWKV-{args.version}": row})


def measure(version: str, backend: str, n_layer: int, n_embd: int) -> dict[str, object]:
    """Within the stand-in: counts of a micro-batch, from its way to the device to the end of its backward pass."""
    # What kernels that do nothing make agrees with nothing.
    recurrence = importlib.import_module(f"rwkv_dpo.kernels.wkv{version}.cuda").KERNELS
    recurrence.agreement = fused.agreement = lambda device, again=False: Agreement({})  # type: ignore[assignment]
    dim_ffn = 4 * n_embd if version == "7" else int(n_embd * 3.5) // 32 * 32
    shape, device = ModelShape(n_layer, n_embd, n_embd, dim_ffn, VOCAB, version=version), torch.device("cuda")
    with device:
        model = empty_model(shape, choose_backend(version, backend, device).wkv, torch.bfloat16)
    module = DPOModule(model, dpo(0.1), 0.5, None, 0, lambda _: None)  # type: ignore[arg-type, return-value]  # no optimizer step follows
    batches = [micro_batch(seed) for seed in range(4)]
    runs = [one(module, batch, device) for batch in batches][1:]
    counts = {name: median(run[name] for run in runs) for name in (*COUNTS, "host s")}
    return {
        "version": version, "n_layer": n_layer, "n_embd": n_embd, "ctx_len": CTX, "pair": LENGTHS, "precision": "bf16", **counts,
        "waits": sum(counts[name] for name in WAITS),
    }  # fmt: skip


def micro_batch(seed: int) -> MicroBatch:
    """Each has lengths of its own, as in a run."""
    windows, lengths = [np.random.default_rng(seed).integers(1, VOCAB, CTX + 1)], (256 - seed, 200 - seed, 150 - seed)
    return collate(windows, make_pairs(lengths, 1, VOCAB), np.full((1, 2), -2000.0))


def one(module: DPOModule, batch: MicroBatch, device: torch.device) -> dict[str, float]:
    for parameter in module.model.parameters():
        parameter.grad = None
    before, begin = counted(), time.perf_counter()
    step = module.transfer_batch_to_device((batch,), device, 0)
    module.on_train_batch_start(step, 0)
    module.training_step(step, 0).backward()
    return dict(zip((*COUNTS, "host s"), [*(now - then for now, then in zip(counted(), before, strict=True)), time.perf_counter() - begin],
                    strict=True))  # fmt: skip


def counted() -> list[int]:
    """The stand-in's own counts so far."""
    counts = ctypes.CDLL(None).fake_counts
    counts.restype = ctypes.POINTER(ctypes.c_long)
    return counts()[: len(COUNTS)]


if __name__ == "__main__":
    main()
