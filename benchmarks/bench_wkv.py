#!/usr/bin/env python3
"""Forward plus backward of every WKV backend, medians in milliseconds, into benchmarks/results/wkv_<device>.json.

    python benchmarks/bench_wkv.py [--device cpu|cuda] [--parts backends versions] [--repeats 30]

`backends` compares those of WKV-5 on many shapes, `versions` WKV-5, 6 and 7 on one. The parity tests run first, and when they fail
nothing is measured. On a GPU the opponent is `sequential`, a plain kernel with one block per sequence and head.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "RWKV-v5" / "src"))

import measure  # noqa: E402 (the path above makes the package importable without installing it)
import torch  # noqa: E402 (as above)
from rwkv_dpo.kernels.backends import WKV, choose_backend  # noqa: E402 (as above)

# Sequences, tokens in each, heads, head size, type, and who takes part. The loop is too slow for more than a short one.
SHAPES = {
    "cpu": (
        (1, 1024, 12, 64, "float32", ("cpu", "chunked")),
        (1, 1024, 12, 64, "bfloat16", ("cpu", "chunked")),
        (1, 4096, 16, 64, "bfloat16", ("cpu", "chunked")),
        (12, 150, 12, 64, "float32", ("cpu", "chunked")),
        (1, 1024, 24, 32, "float32", ("cpu", "chunked")),
        (1, 1024, 6, 128, "float32", ("cpu", "chunked")),
        (1, 1024, 16, 48, "float32", ("cpu", "chunked")),
        (1, 128, 12, 64, "float32", ("cpu", "chunked", "reference")),
    ),
    "cuda": tuple(
        (n_seqs, 4096, 16, 64, dtype, ("cuda", "sequential", "chunked"))
        for dtype in ("bfloat16", "float32")
        for n_seqs in (1, 2, 3, 4)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(SHAPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=("backends", "versions"), default=("backends", "versions"))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--rows", type=int, help="only so many of the shapes")
    parser.add_argument("--parity_holds", action="store_true", help="the caller has run the parity tests")
    flags = parser.parse_args()
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device; --device cpu runs everywhere")
    if not flags.parity_holds:
        refuse_unless_parity_holds()

    # A busy machine slows two threads far more than one: the reader must be able to see it.
    load = os.getloadavg()[0]
    notes = {"unit": "ms, forward plus backward, median", "repeats": flags.repeats, "load_average_before": round(load, 2)}
    if "backends" in flags.parts:
        table = [time_shape(flags.device, flags.repeats, *shape) for shape in SHAPES[flags.device][: flags.rows]]
        measure.save(f"wkv_{flags.device}", {"forward plus backward": {**notes, "table": table}})
    if "versions" in flags.parts:
        table = [time_versions(flags.device, flags.repeats, *shape) for shape in SHAPES[flags.device][: min(flags.rows or 2, 2)]]
        measure.save(f"wkv_{flags.device}", {"versions": {**notes, "table": table}})


def refuse_unless_parity_holds() -> None:
    tests = ROOT / "tests" / "kernels" / "test_backends.py"
    run = subprocess.run([sys.executable, "-m", "pytest", str(tests)], cwd=ROOT, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(f"the parity tests fail, so nothing is measured:\n{run.stdout}{run.stderr}")


def time_shape(device: str, repeats: int, n_seqs: int, length: int, n_heads: int, head_size: int, dtype: str, names) -> dict:
    """One row of the table, printed as it comes."""
    random = torch.Generator().manual_seed(0)
    r, k, v, gy = torch.randn(4, n_seqs * length, n_heads, head_size, generator=random).to(device, getattr(torch, dtype))
    # The decays of a trained model lie between these.
    time_decay = (torch.rand(n_heads, head_size, generator=random) * 11 - 9).to(device)
    u = torch.randn(n_heads, head_size, generator=random).to(device)
    inputs = [x.requires_grad_() for x in (r, k, v, time_decay, u)]
    cu_seqlens = torch.arange(0, (n_seqs + 1) * length, length, dtype=torch.int32)

    def forward_and_backward(wkv5: WKV) -> Callable[[], object]:
        return lambda: torch.autograd.grad(wkv5(*inputs, cu_seqlens)[0], inputs, gy)

    candidates = {name: forward_and_backward(backend(name, device)) for name in names}
    medians = {name: 1e3 * seconds for name, seconds in measure.alternate(candidates, repeats, warmup=3).items()}
    row = {"sequences": n_seqs, "tokens": length, "heads": n_heads, "head_size": head_size, "dtype": dtype}
    shape, times = (f"{name} {value}" for name, value in row.items()), (f"{name} {ms:.2f} ms" for name, ms in medians.items())
    print(*shape, "|", *times, flush=True)
    return {**row, "ms": {name: round(ms, 3) for name, ms in medians.items()}}


def time_versions(device: str, repeats: int, n_seqs: int, length: int, n_heads: int, head_size: int, dtype: str, _: object) -> dict:
    """Every version by the device's own backend and by `chunked`, in turns."""
    names = (device, "chunked")
    random = torch.Generator().manual_seed(0)
    shape, state = (n_seqs * length, n_heads, head_size), (n_heads, head_size)
    r, k, v, gy, x = torch.randn(5, *shape, generator=random).to(getattr(torch, dtype))
    # Decays as models have them: log(-log w) between -9 and 2 (5, 6), up to the bound on 7's.
    decay = torch.rand(shape, generator=random) * 11 - 9
    u, a = torch.randn(state, generator=random), -torch.nn.functional.normalize(x, dim=-1)
    inputs = {
        "5": (r, k, v, decay[0], u),
        "6": (r, k, v, -decay.exp(), u),
        "7": (r, k, v, a, -a * torch.rand(shape, generator=random).to(a), -(-0.5 + decay.clamp(max=0)).exp()),
    }
    cu_seqlens = torch.arange(0, (n_seqs + 1) * length, length, dtype=torch.int32)

    gy = gy.to(device)

    def forward_and_backward(version: str, name: str) -> Callable[[], object]:
        wkv = choose_backend(version, name, torch.device(device)).wkv
        leaves = [x.to(device, copy=True).requires_grad_() for x in inputs[version]]
        return lambda: torch.autograd.grad(wkv(*leaves, cu_seqlens)[0], leaves, gy)

    candidates = {f"wkv{version} {name}": forward_and_backward(version, name) for version in inputs for name in names}
    medians = {name: round(1e3 * seconds, 3) for name, seconds in measure.alternate(candidates, repeats, warmup=3).items()}
    ratios = {
        "over wkv5": {name: round(medians[f"{name} {device}"] / medians[f"wkv5 {device}"], 2) for name in ("wkv6", "wkv7")},
        f"chunked over {device}": {f"wkv{n}": round(medians[f"wkv{n} chunked"] / medians[f"wkv{n} {device}"], 2) for n in inputs},
    }
    row = {"sequences": n_seqs, "tokens": length, "heads": n_heads, "head_size": head_size, "dtype": dtype}
    print(*(f"{name} {value}" for name, value in row.items()), "|", medians, ratios, flush=True)
    return {**row, "ms": medians, **ratios}


def backend(name: str, device: str) -> WKV:
    if name == "sequential":
        import wkv5_sequential  # needs nvcc

        return wkv5_sequential.wkv5
    return choose_backend("5", name, torch.device(device)).wkv


if __name__ == "__main__":
    main()
