"""What every benchmark here shares: alternating timing, peak memory, and result files that say what they were measured on."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from rwkv_dpo.data.pairs import Pair

# gpu_check.py gathers what its parts write.
RESULTS = Path(os.environ.get("BENCH_RESULTS") or Path(__file__).parent / "results")
ROOT = Path(__file__).parent.parent


def alternate(candidates: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each candidate. They take turns, so that a machine that slows down slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + repeats):
        for name, run in candidates.items():
            seconds = _timed(run)
            if i >= warmup:
                times[name].append(seconds)
    return {name: median(values) for name, values in times.items()}


def _timed(run: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Products(TorchDispatchMode):
    """Within it, every matrix product is kept with its operands, so that `run` can do a step's products again and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.calls.append(partial(function, *args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))

    @torch.no_grad()
    def run(self) -> None:
        for call in self.calls:
            call()


class Recurrences:
    """A WKV that keeps what it is called with, so that `run` can do a step's forward and backward through it again and nothing else."""

    def __init__(self, wkv: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.wkv, self.calls = wkv, []  # type: ignore[var-annotated]

    def __call__(self, *inputs: object) -> tuple[torch.Tensor, torch.Tensor]:
        y, ends = self.wkv(*inputs)
        detached = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in inputs]
        self.calls.append((detached, torch.randn_like(y)))
        return y, ends

    def run(self) -> None:
        for inputs, y_grad in self.calls:
            leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
            torch.autograd.grad(self.wkv(*inputs)[0], leaves, y_grad)


def make_pairs(lengths: tuple[int, int, int], n: int, vocab_size: int, seed: int = 0) -> "list[Pair]":
    """Prompt, chosen and rejected answer of these lengths, n times."""
    rng, (prompt, chosen, rejected) = np.random.default_rng(seed), lengths

    def drawn(length: int) -> np.ndarray:
        return rng.integers(1, vocab_size, length)

    return [(drawn(prompt), drawn(chosen), drawn(rejected)) for _ in range(n)]


def machine() -> dict[str, object]:
    """Device, versions and commit, for the head of a result file."""
    return {
        "cpu": _cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def save(name: str, results: Mapping[str, object]) -> None:
    """Writes the parts of `results` into results/NAME.json, each with what it was measured on; other parts stay as they are."""
    path = RESULTS / f"{name}.json"
    parts = json.loads(path.read_text()) if path.exists() else {}
    parts |= {part: {"machine": machine(), "measured": measured} for part, measured in results.items()}
    path.write_text(json.dumps(parts, indent=1) + "\n")
    print(f"wrote {path}")


def _commit() -> str:
    """The commit measured, "-dirty" when files of it have changed; result files don't count: the part before this one wrote them."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)benchmarks/results")
    return git("describe", "--always") + ("-dirty" if changed else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return f"{values.get('model name', platform.machine())}, family {values.get('cpu family', '?')}, {' '.join(wide)}"
