#!/usr/bin/env python3
"""What a GPU makes of this program, into results/gpu_check_<GPU>.json, a file to send: what doctor.py finds, the tests that need a GPU,
the WKV kernels against a plain sequential one, a training step of the 0.4B model (L24 D1024) against the original's way and against the
rate of matrix products, runs of train.py with their throughput, MFU and peak memory beside what --dry_run says, DeepSpeed's stages and
offload, and a run that is stopped and goes on.

    ./benchmarks/gpu_check.sh                   at most ten minutes
    ./benchmarks/gpu_check.sh --parts wkv step
    ./benchmarks/gpu_check.sh --small           every command at tiny sizes on the CPU, into --out

A part that fails or takes too long leaves its last lines in the file, and the next one begins.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "RWKV-v5" / "src"), str(ROOT / "RWKV-v5"), str(ROOT / "tests"), str(Path(__file__).parent)]

import torch  # noqa: E402 (the path above holds what follows)
from bench_gpu_memory import CTX, write_data  # noqa: E402
from measure import RESULTS, machine  # noqa: E402
from runs import flags  # noqa: E402
from rwkv_dpo.memory import estimate as memory  # noqa: E402
from rwkv_dpo.model.shape import ModelShape  # noqa: E402
from rwkv_dpo.run.dry_run import _model_without_memory as empty  # noqa: E402
from rwkv_dpo.run.dry_run import plan_of  # noqa: E402
from rwkv_dpo.run.flags import parse_flags  # noqa: E402

PYTHON = sys.executable
FULL, SMALL = ModelShape(24, 1024, 1024, 3584, 65536), ModelShape(2, 64, 64, 224, 512)
# train.py's flags by a name: what fits where, and how devices work together.
RUNS: dict[str, dict[str, object]] = {
    "no flag": {}, "stage 2": {"strategy": "deepspeed_stage_2"}, "grad_cp": {"grad_cp": 1}, "LoRA": {"grad_cp": 1, "peft": "lora"},
    **{f"stage {name}": {"strategy": f"deepspeed_stage_{name}"} for name in ("1", "3", "2_offload")},
    "state tuning in chunks": {"chunk_ctx": 512, "peft": "state"}, "chunked": {"wkv_backend": "chunked"}, "fp32": {"precision": "fp32"},
}  # fmt: skip


class Check:
    """One check: sizes, where its files are, and how much time is left."""

    def __init__(self, small: bool, folder: Path, seconds: float) -> None:
        self.small, self.folder, self.end = small, folder, time.monotonic() + seconds
        self.shape, self.device = (SMALL, "cpu") if small else (FULL, "cuda")

    def call(self, script: str, *arguments: object, accepts: tuple[int, ...] = (0,)) -> str:
        """What a command prints. Raises RuntimeError with its last lines when it fails, or when no time is left."""
        environment = os.environ | {"BENCH_RESULTS": str(self.folder), "MASTER_PORT": "29517"}
        command = [PYTHON, *([script] if script.startswith("-") else [str(ROOT / script)]), *map(str, arguments)]
        try:
            done = subprocess.run(
                command, env=environment, cwd=ROOT, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=max(self.end - time.monotonic(), 1),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise RuntimeError("the check's time was over; --minutes gives more") from error
        if done.returncode not in accepts:
            raise RuntimeError(f"status {done.returncode}: {done.stdout[-1500:]}")
        return done.stdout

    def written(self, pattern: str) -> dict[str, Any]:
        """What a benchmark has measured, by part."""
        (path,) = self.folder.glob(pattern)
        return {name: part["measured"] for name, part in json.loads(path.read_text()).items()}

    def flags(self, name: str, **changes: object) -> list[str]:
        """Of train.py, for a run of four steps of a window and a pair."""
        ctx = 64 if self.small else CTX
        own: dict[str, object] = {"accelerator": "gpu" if self.device == "cuda" else "cpu", "precision": "bf16", "ctx_len": ctx,
                                  "micro_bsz": 1, "epoch_steps": 4, "epoch_count": 1, "epoch_save": 0, "wkv_backend": "auto"}  # fmt: skip
        if self.small and changes.get("chunk_ctx"):
            changes = changes | {"chunk_ctx": 32}
        return flags(self.folder, self.folder / name.replace(" ", "_"), **{**own, **changes})


def doctor(check: Check) -> Any:
    return json.loads(check.call("RWKV-v5/doctor.py", "--json", "--device", check.device, accepts=(0, 1)))


def parity(check: Check) -> Any:
    chosen = ("-k", "test_full_chunks") if check.small else ("-m", "gpu")
    return check.call("-m", "pytest", "-p", "no:cacheprovider", "tests/kernels", *chosen).splitlines()[-1]


def wkv(check: Check) -> Any:
    few = ("--rows", 1, "--repeats", 1) if check.small else ("--repeats", 20)
    check.call("benchmarks/bench_wkv.py", "--device", check.device, "--parity_holds", *few)
    return check.written("wkv_*.json")


def step(check: Check) -> Any:
    shape, few = check.shape, ("--repeats", 1) if check.small else ("--repeats", 5)
    check.call(
        "benchmarks/bench_step.py", "--device", check.device, "--n_layer", shape.n_layer, "--n_embd", shape.n_embd, "--parts", "pairs",
        "language_model", *few,
    )  # fmt: skip
    return check.written("step_*.json")


def runs(check: Check) -> Any:
    """By name: throughput after the first step, the share of the matrix products' rate, and memory; or what went wrong."""
    rates = {precision: matrix_rate(check, precision) for precision in (torch.bfloat16, torch.float32)}
    return {name: attempt(partial(of_a_run, check, name, changes, rates)) for name, changes in RUNS.items()}


def of_a_run(check: Check, name: str, changes: dict[str, object], rates: dict[torch.dtype, float]) -> dict[str, Any]:
    given = check.flags(name, **changes)
    settings, _ = parse_flags(given)
    estimate = sum(memory.estimate(plan_of(settings, empty(check.shape))[0]).values())
    check.call("RWKV-v5/train.py", *given)
    lines = [json.loads(line) for line in (check.folder / name.replace(" ", "_") / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    tokens_per_s, s = median(line["tokens_per_s"] for line in lines[1:]), check.shape
    # Forward, and backward with respect to inputs and to weights.
    per_token = 6 * s.n_layer * (6 * s.n_embd**2 + 2 * s.n_embd * s.dim_ffn) + 6 * s.n_embd * s.vocab_size
    rate = rates[torch.float32 if changes.get("precision") == "fp32" else torch.bfloat16]
    row: dict[str, Any] = {"tokens/s": tokens_per_s, "peak GB": lines[-1]["peak_memory_gb"], "loss": [line["loss"] for line in lines]}
    if changes.get("peft", "none") == "none":
        row["share of the rate of matrix products"] = tokens_per_s * per_token / rate
    return row | {"--dry_run GB": estimate / 1e9}


def matrix_rate(check: Check, dtype: torch.dtype) -> float:
    """Operations a second of a large product."""
    n = 256 if check.small else 8192
    a = torch.randn(n, n, device=check.device).to(dtype)
    wait: Callable[[], object] = torch.cuda.synchronize if check.device == "cuda" else lambda: None
    for repeats in (3, 10):
        wait()
        begin = time.perf_counter()
        for _ in range(repeats):
            a @ a
        wait()
        rate = repeats * 2 * n**3 / (time.perf_counter() - begin)
    return rate


def resume(check: Check) -> Any:
    """A run that is stopped by SIGTERM after some steps, and the same command again."""
    given = check.flags("resumed", epoch_steps=200 if check.small else 40, save_every=2)
    log = check.folder / "resumed" / "metrics.jsonl"
    command = [PYTHON, str(ROOT / "RWKV-v5" / "train.py"), *given]
    with open(check.folder / "resumed.log", "w") as said:
        run = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        while run.poll() is None and time.monotonic() < check.end and (not log.exists() or log.read_text().count("\n") < 3):
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        status = run.wait(60)
    stopped_after = log.read_text().count("\n")
    said_again = check.call("RWKV-v5/train.py", *given)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    if steps != list(range(1, len(steps) + 1)) or not 3 <= stopped_after < len(steps):
        raise RuntimeError(f"status {status}, steps {steps}, stopped after {stopped_after}: {said_again[-1000:]}")
    return {"stopped after": stopped_after, "steps": len(steps)}


PARTS: dict[str, Callable[[Check], Any]] = {
    "doctor": doctor, "parity": parity, "wkv": wkv, "step": step, "resume": resume, "runs": runs,
}  # fmt: skip


def attempt(part: Callable[[], Any]) -> Any:
    try:
        return part()
    except (RuntimeError, OSError, AssertionError, ValueError, subprocess.TimeoutExpired) as error:
        return {"failed": str(error) or type(error).__name__}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--minutes", type=float, default=10, help="for all of it (10)")
    parser.add_argument("--out", type=Path, help="file to write")
    args = parser.parse_args(arguments)
    if not args.small and not torch.cuda.is_available():
        sys.exit("gpu_check: no usable NVIDIA GPU here (RWKV-v5/doctor.py says why); --small tries the commands on the CPU")
    if args.small and not args.out:
        sys.exit("gpu_check: --small needs --out, since it measures nothing worth keeping")
    name = re.sub(r"\W+", "_", torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"
    out, results = args.out or RESULTS / f"gpu_check_{name}.json", {}
    with tempfile.TemporaryDirectory() as folder:
        check = Check(args.small, Path(folder), 60 * args.minutes)
        write_data(check.folder, check.shape)
        for part in args.parts:
            begin = time.monotonic()
            measured = attempt(lambda part=part: PARTS[part](check))  # type: ignore[misc]  # mypy knows no default for a lambda
            results[part] = {"machine": machine(), "seconds": round(time.monotonic() - begin, 1), "measured": measured}
            print(part, json.dumps(measured, indent=1), flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {out}")
    return 1 if '"failed"' in json.dumps(results) else 0


if __name__ == "__main__":
    sys.exit(main())
