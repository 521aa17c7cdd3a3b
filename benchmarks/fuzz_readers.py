#!/usr/bin/env python3
"""Hostile and damaged inputs for every reader of a file, and for the flags, into benchmarks/results/fuzz.json.

    python benchmarks/fuzz_readers.py [--inputs 100000] [--readers checkpoint pairs_packed] [--seed 0] [--engines seeded atheris]

Each reader runs in a process of its own (tests/fuzz), one after the other, under a limit of address space and of CPU seconds an input.
An input that breaks a promise is kept in --keep, with what happened. A process that dies takes one input with it, is counted and started
again. Half of the inputs are drawn from the seeds, half are chosen by atheris (libFuzzer for Python) by the branches they take; without it,
all are drawn.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in ("RWKV-v5/src", "RWKV-v5", "tests"):
    sys.path.insert(0, str(ROOT / folder))

import measure  # noqa: E402 (the paths above make it, and the next, importable)
from fuzz.guard import ALWAYS, PER_BYTE, PER_PACKED_BYTE, SECONDS  # noqa: E402 (as above)
from fuzz.readers import READERS  # noqa: E402 (as above)

# Seconds without a new count after which a process is taken for stuck in code that its own clock cannot stop.
STUCK = 120
ENGINES = ("seeded", "atheris")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="changed inputs over all file readers (the flags come on top)")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="both, where atheris is installed")
    parser.add_argument("--keep", type=Path, default=ROOT / "fuzz_findings", help="where inputs that break a promise are kept")
    flags = parser.parse_args()
    engines = flags.engines or ENGINES[: 2 if importlib.util.find_spec("atheris") else 1]
    shares = sum(READERS[name].share for name in flags.readers if name != "flags")
    reports: dict[str, dict[str, object]] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for name in flags.readers:
            runs = -(-flags.inputs * READERS[name].share // max(shares, 1))
            for engine in engines:
                place = Path(folder, f"{name}-{engine}")
                reports[f"{name}, {engine}"] = report = fuzz(name, -(-runs // len(engines)), flags.seed, engine, place, flags.keep)
                print(f"{name}, {engine}: {report}", flush=True)
    files = [report for name, report in reports.items() if not name.startswith("flags")]
    results = {
        "seed": flags.seed,
        "inputs_over_file_readers": sum(int(report["inputs"]) for report in files),  # type: ignore[call-overload]
        "findings": sum(len(report["findings"]) for report in reports.values()),  # type: ignore[arg-type, misc]
        "seconds": round(time.perf_counter() - start),
        "limits": {
            "cpu_s_an_input": SECONDS,
            "memory": f"{ALWAYS >> 20} MB + {PER_BYTE} bytes ({PER_PACKED_BYTE} of a .gz) a byte of the input",
        },
        "readers": reports,
    }
    measure.save("fuzz", {"campaign": results})
    sys.exit(1 if results["findings"] else 0)


def fuzz(name: str, runs: int, seed: int, engine: str, folder: Path, keep: Path) -> dict[str, object]:
    """All inputs of one reader, in as many processes as it takes."""
    folder.mkdir()
    total: dict[str, object] = {
        "inputs": 0,
        "accepted": 0,
        "refused": 0,
        "failed": 0,
        "deaths": 0,
        "slowest_cpu_s": 0.0,
        "memory_growth_mb": 0,
    }
    findings: list[str] = []
    start = time.perf_counter()
    while int(total["inputs"]) < runs and int(total["deaths"]) < 20:  # type: ignore[call-overload]
        left = runs - int(total["inputs"])  # type: ignore[call-overload]
        status = run_worker(name, left, seed + int(total["deaths"]), engine, folder)  # type: ignore[call-overload]
        report = json.loads((folder / f"{name}.json").read_text())
        counts = {outcome: report.get(outcome, 0) for outcome in ("accepted", "refused", "failed")}
        if is_dead := status != 0:
            total["deaths"] = int(total["deaths"]) + 1  # type: ignore[call-overload]
            last = next(iter(sorted(folder.glob("input*"))))
            keep.mkdir(exist_ok=True)
            shutil.copyfile(last, keep / f"{name}-{engine}-death{total['deaths']}{READERS[name].suffix}")
            findings.append(f"the process ended with {status}")
        for outcome, n in counts.items():
            total[outcome] = int(total[outcome]) + n  # type: ignore[call-overload]
        total["inputs"] = int(total["inputs"]) + sum(counts.values()) + is_dead  # type: ignore[call-overload]
        for extreme in ("slowest_cpu_s", "memory_growth_mb"):
            total[extreme] = max(total[extreme], report[extreme])  # type: ignore[type-var]
        findings += report["findings"]
    for finding in folder.glob("finding-*"):
        keep.mkdir(exist_ok=True)
        shutil.copy(finding, keep)
    return {**total, "seconds": round(time.perf_counter() - start, 1), "findings": findings}


def run_worker(name: str, runs: int, seed: int, engine: str, folder: Path) -> int:
    """Exit status of a process that gives so many inputs to a reader; it is ended when it makes no progress."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("RWKV-v5/src", "RWKV-v5", "tests"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "fuzz.worker",
        name,
        "--runs",
        str(runs),
        "--seed",
        str(seed),
        "--engine",
        engine,
        "--folder",
        str(folder),
    ]
    report = folder / f"{name}.json"
    report.unlink(missing_ok=True)
    with open(folder / "log.txt", "wb") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process:
        seen, since = -1.0, time.monotonic()
        while process.poll() is None:
            time.sleep(0.2)
            now = report.stat().st_mtime if report.exists() else 0.0
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > STUCK:
                process.kill()
    if not report.exists():
        sys.exit(f"{name}: no report\n{(folder / 'log.txt').read_text(errors='replace')[-3000:]}")
    return process.returncode


if __name__ == "__main__":
    main()
