#!/usr/bin/env python3
"""What a micro-batch costs beside its arithmetic: operations that torch dispatches, casts among them, and the CPU time of a step so narrow
that only overhead is left; this tree against an earlier commit, in turns.

    python benchmarks/bench_overhead.py --against COMMIT [--version 7]      writes benchmarks/results/overhead_cpu.json

L24 D64, a window of 32 tokens and a pair of 8/6/5, one thread. Views are not counted. A GPU waits for this time on its host whenever
its own work is shorter. Parity is bench_step.py's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
N_LAYER, WIDTH, REPEATS = 24, 64, 40


def child(source: str, precision: str, version: str) -> dict[str, Any]:
    """Counts and seconds of the package in `source`."""
    sys.path.insert(0, source)
    import numpy as np
    import torch
    from measure import Products
    from rwkv_dpo.batches.micro_batch import collate
    from rwkv_dpo.model.checkpoint import empty_model
    from rwkv_dpo.model.shape import ModelShape
    from rwkv_dpo.objective.losses import dpo
    from rwkv_dpo.objective.objective import objective
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        """Operations by name; casts under "cast"."""

        def __init__(self) -> None:
            super().__init__()
            self.counts: Counter[str] = Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            name = str(function)
            if function.is_view or function.namespace != "aten" or name.startswith(("aten.detach", "aten._unsafe_view")):
                return result
            self.counts[name] += 1
            if name.startswith("aten._foreach_copy_"):
                self.counts["cast"] += args[0][0].dtype != args[1][0].dtype
            elif name.startswith(("aten.copy_", "aten._to_copy")):
                other = args[name.startswith("aten.copy_")]
                self.counts["cast"] += other.dtype != result.dtype
            return result

    torch.set_num_threads(1)
    newer: dict[str, Any] = {} if version == "5" else {"version": version}  # which a commit that knows RWKV-5 only has not
    shape = ModelShape(N_LAYER, WIDTH, WIDTH, int(3.5 * WIDTH), 65, **newer)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    try:
        from rwkv_dpo.kernels.backends import choose_backend
    except ModuleNotFoundError:  # a commit that knows RWKV-5 only
        from rwkv_dpo.kernels import wkv5

        model = empty_model(shape, "5", wkv5.choose_backend("cpu", torch.device("cpu")).wkv5, dtype)  # type: ignore
    else:
        model = empty_model(shape, choose_backend(shape.version, "cpu", torch.device("cpu")).wkv, dtype)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0, 0.1)
    pair = rng.integers(1, 65, 8), rng.integers(1, 65, 6), rng.integers(1, 65, 5)
    batch = collate([rng.integers(1, 65, 33)], [pair], np.full((1, 2), -20.0))

    def micro_batch() -> None:
        objective(model, batch, dpo(0.1), 0.5)[0].backward()

    with Products() as products:
        micro_batch()
    seconds, of_products = [], []
    for _ in range(REPEATS):
        start = time.process_time()
        micro_batch()
        middle = time.process_time()
        model.zero_grad(set_to_none=True)
        seconds.append(middle - start)
        start = time.process_time()
        products.run()
        of_products.append(time.process_time() - start)
    with Counting() as counting:
        micro_batch()
    counts = counting.counts
    casts = counts.pop("cast")
    return {
        "seconds": median(seconds[REPEATS // 4 :]), "products": median(of_products[REPEATS // 4 :]), "operations": counts.total(),
        "casts": casts, "most": counts.most_common(12),
    }  # fmt: skip


def measure(sources: dict[str, str], precision: str, version: str) -> dict[str, Any]:
    """Each source's counts, and the median over processes of its median time; processes take turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
    for _ in range(3):
        for name, source in sources.items():
            command = [sys.executable, __file__, "--child", source, precision, version]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    row: dict[str, Any] = {"precision": precision}
    for name, runs in found.items():
        row[f"{name} ms"] = 1000 * median(run["seconds"] for run in runs)
        row[f"{name} ms, matrix products alone"] = 1000 * median(run["products"] for run in runs)
        row[f"{name} operations a layer"] = runs[0]["operations"] / N_LAYER
        row[f"{name} casts a layer"] = runs[0]["casts"] / N_LAYER
        row[f"{name} most frequent"] = runs[0]["most"]
    if "before" in found:
        row["time, now / before"] = row["now ms"] / row["before ms"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--against", default="", help="a commit whose package is measured beside this tree's")
    parser.add_argument("--version", choices=["5", "6", "7"], default="5", help="of RWKV")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(*args.child)))
        return
    from measure import machine, save

    with tempfile.TemporaryDirectory() as folder:
        sources = {"now": str(ROOT / "RWKV-v5/src")}
        if args.against:
            archive = subprocess.run(["git", "archive", args.against, "RWKV-v5/src"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
            sources["before"] = f"{folder}/RWKV-v5/src"
        print(machine())
        rows = [measure(sources, precision, args.version) for precision in ("fp32", "bf16")]
    for row in rows:
        print("\n".join(f"{name:30} {value}" for name, value in row.items()), flush=True)
    part = "micro_batch" if args.version == "5" else f"micro_batch, RWKV-{args.version}"
    save("overhead_cpu", {part: {"against": args.against, "rows": rows}})


if __name__ == "__main__":
    main()
