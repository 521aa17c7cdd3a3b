#!/usr/bin/env python3
"""Trains a tiny model for an hour or 20,000 steps, whichever is longer, and looks for what only time shows; the figures go to
benchmarks/results/long_run.json.

    python benchmarks/long_run.py [--minutes 60] [--steps 20000] [--name long_run] [-- --save_every 500]

train.py runs as users run it, in a process of its own on one thread, with windows of the demo corpus and pairs that the starting model
scored; what follows `--` goes to it. Memory, open files and threads of the process are sampled from outside (Linux).

Speeds compare the median step of the first and of the last tenth. Over an hour a rented machine changes its own pace by more than the
5 % that are asked for, so the last tenth is also compared with a run that has just begun and takes turns with it: whatever the machine
does then, it does to both. Pin everything to one core (taskset), so that the two share that too.
"""

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "RWKV-v5" / "src"))

import measure  # noqa: E402 (the path above makes the package importable without installing it)
import numpy as np  # noqa: E402 (as above)
import torch  # noqa: E402 (as above)
from rwkv_dpo.data.pair_files import save_pairs  # noqa: E402 (as above)
from rwkv_dpo.data.pairs import pack_pairs  # noqa: E402 (as above)
from rwkv_dpo.evaluation.scoring import score_pairs  # noqa: E402 (as above)
from rwkv_dpo.model.checkpoint import load_model, save_weights  # noqa: E402 (as above)

VOCABULARY, WIDTH, LAYERS, CTX_LEN = 256, 64, 2, 64
EPOCH_STEPS = 500
# Of the comparison with a run that has just begun.
TURNS, TURN_SECONDS = 20, 6.0
MARKS = {"memory_change": 0.02, "speed_change": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--name", default="long_run", help="of the result file; a trial run is best kept under another")
    parser.add_argument("--sample_seconds", type=float, default=1.0)
    parser.add_argument("train_flags", nargs="*", help="after --: further flags of train.py")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_inputs(folder)
        rate = steps_per_second(folder, flags.train_flags)
        # A tenth more: the rate of a short run is not that of a long one, and a run that falls short has to be made again.
        steps = max(flags.steps, math.ceil(1.1 * flags.minutes * 60 * rate))
        epochs = math.ceil(steps / EPOCH_STEPS)
        minutes = epochs * EPOCH_STEPS / rate / 60
        print(f"{rate:.1f} steps/s: {epochs} epochs of {EPOCH_STEPS} steps, some {minutes:.0f} minutes", flush=True)
        metrics = folder / "run" / "metrics.jsonl"
        parts: dict[str, object] = {}

        def in_the_last_tenth(process: subprocess.Popen) -> None:
            # The last tenth of a trial is shorter than the turns.
            if not parts and 0.08 * 60 * minutes > TURNS * TURN_SECONDS and last_step(metrics) > 0.92 * epochs * EPOCH_STEPS:
                parts["against_a_fresh_run"] = take_turns(process.pid, metrics, folder, epochs, flags.train_flags)

        seconds, samples = train(folder, "run", epochs, EPOCH_STEPS, flags.train_flags, flags.sample_seconds, in_the_last_tenth)
        records = [json.loads(line) for line in metrics.read_text().splitlines()]
    measured = {
        "model": f"L{LAYERS} D{WIDTH} vocabulary {VOCABULARY}, ctx_len {CTX_LEN}, 1 window and 1 pair a step, fp32, 1 thread",
        "train_flags": flags.train_flags,
        "steps": len(records),
        "minutes": round(seconds / 60, 1),
        "load_average_after": round(os.getloadavg()[0], 2),
        "metrics": check_metrics(records, epochs * EPOCH_STEPS),
        **resources(samples),
        **speeds(records, samples),
        "marks": MARKS,
    }
    measured["passed"] = passed(measured) and seconds >= 60 * flags.minutes and len(records) >= flags.steps
    parts["run"] = measured
    print(json.dumps(parts, indent=1))
    measure.save(flags.name, parts)
    sys.exit(0 if measured["passed"] else 1)


def make_inputs(folder: Path) -> None:
    """A corpus of bytes, a starting model (of one step at a rate of 0), and pairs that it scored."""
    text = (ROOT / "RWKV-v5" / "demo" / "corpus.jsonl").read_bytes()
    np.frombuffer(text, np.uint8).astype("<u2").tofile(folder / "corpus.bin")
    draw = np.random.default_rng(0)
    pairs = pack_pairs([tuple(draw.integers(1, VOCABULARY, n) for n in draw.integers(4, 24, 3)) for _ in range(1000)])
    save_pairs(folder / "unscored.save", pairs.with_ref_logps(np.zeros((len(pairs), 2)), "0" * 64, "fp32"))
    shape = [f"--n_layer={LAYERS}", f"--n_embd={WIDTH}", f"--vocab_size={VOCABULARY}", "--lr_init=0", "--lr_final=0"]
    train(folder, "start", 1, 1, ["--dpo_train_file", str(folder / "unscored.save"), "--load_model=", *shape], 1.0)
    (folder / "start" / "rwkv-final.pth").rename(folder / "model.pth")
    model = load_model(folder / "model.pth", device=torch.device("cpu"), compute_dtype=torch.float32)
    save_pairs(folder / "pairs.save", pairs.with_ref_logps(score_pairs(model, pairs, 4096), "0" * 64, "fp32"))
    save_weights(model.state_dict(), folder / "model.pth")


def steps_per_second(folder: Path, train_flags: list[str]) -> float:
    """Measured on two short runs, so that starting does not count."""
    times = [train(folder, f"trial{n}", 1, n, train_flags, 1.0)[0] for n in (50, 550)]
    return 500 / max(times[1] - times[0], 1e-3)


def train(
    folder: Path, name: str, epochs: int, steps: int, train_flags: list[str], every: float,
    watch: Callable[[subprocess.Popen], None] = lambda _: None,
) -> tuple[float, list[dict[str, float]]]:  # fmt: skip
    """Seconds of a run of train.py, and samples of its process while it trained. watch is called after each."""
    start, samples = time.perf_counter(), []
    with start_training(folder, name, epochs, steps, train_flags) as process:
        metrics = folder / name / "metrics.jsonl"
        for number in itertools.count(1):
            if process.poll() is not None:
                break
            if metrics.exists() and (found := sample(process.pid)):
                samples.append({"seconds": time.perf_counter() - start, **found})
                watch(process)
            # In step with the clock, however long a sample takes.
            time.sleep(max(0.0, start + number * every - time.perf_counter()))
    if process.returncode:
        sys.exit(f"train.py ended with {process.returncode}:\n{(folder / f'{name}.log').read_text(errors='replace')[-3000:]}")
    return time.perf_counter() - start, samples


def start_training(folder: Path, name: str, epochs: int, steps: int, train_flags: list[str]) -> subprocess.Popen:
    settings = {
        "load_model": folder / "model.pth", "proj_dir": folder / name, "data_file": folder / "corpus.bin", "data_type": "uint16",
        "ctx_len": CTX_LEN, "dpo_train_file": folder / "pairs.save", "dpo_general_corpus_ratio": 0.5, "dpo_beta": 0.1, "micro_bsz": 1,
        "epoch_steps": steps, "epoch_count": epochs, "epoch_save": 5, "lr_init": 1e-4, "lr_final": 1e-5, "accelerator": "cpu",
        "precision": "fp32", "enable_progress_bar": False,
    }  # fmt: skip
    arguments = [part for flag, value in settings.items() for part in (f"--{flag}", str(value))]
    command = [sys.executable, str(ROOT / "RWKV-v5" / "train.py"), *arguments, *train_flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with open(folder / f"{name}.log", "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def take_turns(pid: int, metrics: Path, folder: Path, epochs: int, train_flags: list[str]) -> dict[str, object]:
    """The step of the run `pid` over that of one with the same flags that begins now. One of them is stopped at any time."""
    os.kill(pid, signal.SIGSTOP)
    fresh, fresh_metrics = start_training(folder, "fresh", epochs, EPOCH_STEPS, train_flags), folder / "fresh" / "metrics.jsonl"
    try:
        while fresh.poll() is None and last_step(fresh_metrics) < EPOCH_STEPS:
            time.sleep(0.1)
        fresh.send_signal(signal.SIGSTOP)
        pairs = []
        for _ in range(TURNS):
            pairs.append([step_of_a_turn(*one) for one in ((fresh.pid, fresh_metrics), (pid, metrics))])
    finally:
        fresh.kill()
        fresh.wait()
        os.kill(pid, signal.SIGCONT)
    change = median(fresh / late for fresh, late in pairs) - 1
    return {
        "turns": f"{TURNS} of {TURN_SECONDS} s each, to step {last_step(metrics)}",
        "step_ms_fresh": [round(1000 * fresh, 3) for fresh, _ in pairs],
        "step_ms": [round(1000 * late, 3) for _, late in pairs],
        "speed_change": round(change, 4),
        "marks": {"speed_change": MARKS["speed_change"]},
        "passed": abs(change) <= MARKS["speed_change"],
    }


def step_of_a_turn(pid: int, metrics: Path) -> float:
    """Median seconds of a step while the stopped process `pid` goes on for a turn."""
    begin = metrics.stat().st_size
    os.kill(pid, signal.SIGCONT)
    time.sleep(TURN_SECONDS)
    os.kill(pid, signal.SIGSTOP)
    with open(metrics, "rb") as file:
        file.seek(begin)
        # The first step was stopped in the middle, and of the last a part may be written.
        lines = file.read().splitlines()[1:-1]
    return median(record["tokens"] / record["tokens_per_s"] for record in map(json.loads, lines[1:]))


def last_step(metrics: Path) -> int:
    """0 before the first is written."""
    if not metrics.exists():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))
        lines = file.read().splitlines()[1:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def sample(pid: int) -> dict[str, float] | None:
    """What the process holds and has used; None when it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        n_files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    if stat[0] == "Z" or not n_files:
        return None
    return {
        "rss_mb": int(stat[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "cpu_s": (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"),
        "threads": int(stat[17]),
        "files": n_files,
    }


def check_metrics(records: list[dict[str, float]], n_steps: int) -> dict[str, object]:
    steps = [record["step"] for record in records]
    return {
        "every_step_once_in_order": steps == list(range(1, n_steps + 1)),
        "same_fields": all(record.keys() == records[0].keys() for record in records),
        "all_finite": all(math.isfinite(value) for record in records for value in record.values() if value is not None)
        and all(None not in record.values() for record in records),
    }


def tenth(values: list, number: int) -> list:
    """The tenth of that number, counted from 1."""
    return values[len(values) * (number - 1) // 10 : len(values) * number // 10] or values[-1:]


def resources(samples: list[dict[str, float]]) -> dict[str, object]:
    """Memory of the last tenth against the second (the first still allocates), and open files and threads of both."""
    early, late = tenth(samples, 2), tenth(samples, 10)
    rss = [median(one["rss_mb"] for one in part) for part in (early, late)]
    return {
        "rss_mb_by_tenth": [round(median(one["rss_mb"] for one in tenth(samples, i)), 1) for i in range(1, 11)],
        "memory_change": round(rss[1] / rss[0] - 1, 4),
        "files": [median(one["files"] for one in part) for part in (early, late)],
        "threads": [median(one["threads"] for one in part) for part in (early, late)],
    }


def speeds(records: list[dict[str, float]], samples: list[dict[str, float]]) -> dict[str, object]:
    """Median seconds of a step, from the metrics, and CPU seconds a step, from the samples of a tenth of the time."""
    first, last = (median(one["tokens"] / one["tokens_per_s"] for one in tenth(records, number)) for number in (1, 10))
    # Samples come evenly in time; how many steps a tenth of the time holds follows from the metrics.
    ends = np.cumsum([one["tokens"] / one["tokens_per_s"] for one in records])
    cpu = []
    for number in (2, 10):
        part = tenth(samples, number)
        begin = samples[0]["seconds"]
        n_steps = np.searchsorted(ends, part[-1]["seconds"] - begin) - np.searchsorted(ends, part[0]["seconds"] - begin)
        cpu.append((part[-1]["cpu_s"] - part[0]["cpu_s"]) / max(int(n_steps), 1))
    return {
        "step_ms": [round(1000 * seconds, 3) for seconds in (first, last)],
        "speed_change": round(first / last - 1, 4),
        "cpu_ms_a_step": [round(1000 * seconds, 3) for seconds in cpu],
    }


def passed(measured: dict) -> bool:
    return (
        all(measured["metrics"].values())
        and abs(measured["memory_change"]) <= MARKS["memory_change"]
        and measured["files"][0] >= measured["files"][1]
        and measured["threads"][0] >= measured["threads"][1]
        and abs(measured["speed_change"]) <= MARKS["speed_change"]
    )


if __name__ == "__main__":
    main()
