#!/usr/bin/env python3
"""Speed of optimizer steps whose model calls are filled by tokens (--batch_tokens), against the same steps of one pair a call.

    python benchmarks/bench_packing.py        some ten minutes on 2 cores; writes benchmarks/results/packing_*.json

Short pairs, of a prompt of 30 tokens and answers of 20 and 15, and 32 of them in a step (--micro_bsz 1 --accumulate_grad_batches 32), with
and without as many corpus windows. A step is forward and backward of all its calls, clipping and AdamW. Parity comes first: both ways have
the loss and the gradients of one another, or nothing is timed.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "RWKV-v5" / "src"))

from measure import alternate, machine, save
from rwkv_dpo.batches.loader import StepBatch, Steps
from rwkv_dpo.batches.samples import Samples
from rwkv_dpo.batches.settings import BatchSettings
from rwkv_dpo.data.corpus import Corpus
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.devices.device import tune_cpu
from rwkv_dpo.kernels.backends import choose_backend
from rwkv_dpo.model.checkpoint import empty_model
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.objective.objective import objective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTHS, ACCUMULATED, WINDOW, RATIO, BETA = (30, 20, 15), 32, 64, 0.5, 0.1


def build(shape: ModelShape, precision: str, backend: str, device: torch.device) -> RWKV:
    """A model of random weights, all of them alive."""
    model = empty_model(shape, choose_backend(shape.version, backend, device).wkv, DTYPES[precision])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.normal_(0, p.shape[1] ** -0.5, generator=generator)
            else:
                p.uniform_(0, 1, generator=generator)
    return model.to(device)


def step_batch(vocab_size: int, batch_tokens: int, with_windows: bool, device: torch.device) -> StepBatch:
    """The micro-batches of a step."""
    rng = np.random.default_rng(0)
    rows = [tuple(rng.integers(1, vocab_size, n) for n in LENGTHS) for _ in range(4 * ACCUMULATED)]
    pairs = pack_pairs(rows, np.full((len(rows), 2), -200.0))
    corpus = Corpus("random", rng.integers(1, vocab_size, 100_000), vocab_size) if with_windows else None
    settings = BatchSettings(micro_bsz=1, batch_tokens=batch_tokens)
    return tuple(batch.to(device) for batch in Steps(Samples(settings, WINDOW, 0, 1, ACCUMULATED, corpus, pairs), 0)[0])


def gradients_of(model: RWKV, batch: StepBatch) -> float:
    """Adds the step's gradients to the parameters'; returns its loss."""
    ratio, total = RATIO if any(one.n_windows for one in batch) else 0.0, 0.0
    for one in batch:
        loss = objective(model, one, dpo(BETA), ratio)[0] / len(batch)
        loss.backward()
        total += float(loss.detach())
    return total


def check_parity(backend: str, device: torch.device) -> None:
    """On a small model in fp32: the loss to 1e-5, every gradient to 1e-3 (fp32 rounding over two layers)."""
    for with_windows in (False, True):
        losses, grads = [], []
        for batch_tokens in (0, 500):
            model = build(ModelShape(2, 128, 128, 448, 512), "fp32", backend, device)
            losses.append(gradients_of(model, step_batch(512, batch_tokens, with_windows, device)))
            grads.append([p.grad for p in model.parameters() if p.grad is not None])
        worst = max(float((a - b).norm() / a.norm().clamp(min=1e-6)) for a, b in zip(*grads, strict=True))
        if abs(losses[0] / losses[1] - 1) > 1e-5 or worst > 1e-3:
            sys.exit(f"packed and not packed disagree: losses {losses}, worst gradient {worst:.1e}; nothing was timed")
        print(f"parity: losses {losses[0]:.6f} and {losses[1]:.6f}, worst gradient difference {worst:.1e}")


def step_of(model: RWKV, optimizer: torch.optim.Optimizer, batch: StepBatch) -> Callable[[], None]:
    """A whole optimizer step."""

    def run() -> None:
        gradients_of(model, batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def time_steps(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """tokens/s: of tokens that go through the blocks, each once."""
    rows = []
    for precision in args.precisions:
        model = build(args.shape, precision, args.wkv_backend, device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        for with_windows in (False, True):
            batches = {n: step_batch(args.shape.vocab_size, n, with_windows, device) for n in (0, *args.batch_tokens)}
            runs = {f"batch_tokens {n}": step_of(model, optimizer, batch) for n, batch in batches.items()}
            seconds = alternate(runs, args.repeats)
            n_tokens = sum(one.step.forest.tokens.numel() for one in batches[0])
            for n, batch in batches.items():
                took = seconds[f"batch_tokens {n}"]
                row = {"precision": precision, "window": WINDOW * with_windows, "batch_tokens": n, "calls": len(batch)}
                row |= {"step ms": 1000 * took, "tokens/s": n_tokens / took, "speedup": seconds["batch_tokens 0"] / took}
                print(*(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()), sep="  ")
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=256)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--batch_tokens", type=int, nargs="+", default=[512, 2048, 4096])
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wkv_backend", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.shape = ModelShape(args.n_layer, args.n_embd, args.n_embd, int(args.n_embd * 3.5) // 32 * 32, args.vocab_size)
    device = torch.device(args.device)
    check_parity(args.wkv_backend, device)
    if device.type == "cpu":
        tune_cpu(keep_memory=True)
    print(machine())
    what = {"vocab_size": args.vocab_size, "prompt/chosen/rejected": LENGTHS, "pairs in a step": ACCUMULATED}
    save(f"packing_{device.type}_L{args.n_layer}_D{args.n_embd}", {"steps": {**what, "rows": time_steps(args, device)}})


if __name__ == "__main__":
    main()
