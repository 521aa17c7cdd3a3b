"""One process that gives a reader's inputs to it: the hostile ones, then changed ones, under guard.

    python -m fuzz.worker READER --runs 1000 --seed 0 --folder FOLDER [--engine atheris]

The input at hand is always in FOLDER, whatever becomes of the process. Counts and findings go to FOLDER/READER.json.
"""

import argparse
import hashlib
import json
import os
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from rwkv_dpo.base.errors import InputError

from fuzz import mutations, readers
from fuzz.guard import Guard, TooSlow, asked_for_too_much


class Run:
    """Gives inputs to one reader and keeps account."""

    def __init__(self, name: str, folder: Path, guard: Guard) -> None:
        self.name, self.folder, self.guard = name, folder, guard
        self.reader = readers.READERS[name]
        self.path = folder / f"input{self.reader.suffix}"
        self.counts: Counter[str] = Counter()
        self.findings: dict[str, str] = {}
        self.slowest, self.grown = 0.0, 0
        self.hostile: dict[str, bytes] = {}

    def give(self, content: bytes, label: str = "") -> str:
        """What became of one input: accepted, refused, or a finding."""
        self.path.write_bytes(content)
        readers.prepare(self.path)
        start, fault = time.process_time(), None
        try:
            with self.guard.watch(self.path, len(content), self.reader.is_packed):
                self.reader.read(self.path)
        except InputError as error:
            fault = _signature(error) if asked_for_too_much(error) else None
            outcome = "refused"
            if "\n" in str(error) or len(str(error)) > 1100:
                fault = "a message of more than a line"
        except (TooSlow, Exception) as error:
            outcome, fault = "failed", _signature(error)
        else:
            outcome = "accepted"
        self.slowest, self.grown = max(self.slowest, time.process_time() - start), max(self.grown, self.guard.grown)
        if fault := "; ".join(sorted(set(self.guard.violations))) or fault:
            outcome = "failed"
            self._keep(fault, content, label)
        self.counts[outcome] += 1
        return outcome

    def warm_up(self) -> list[bytes]:
        """The valid inputs, given twice: what a first call imports and keeps is no growth. Then some have to be accepted, and none may
        fail. Hostile ones are made here too, because some take more memory than is left under the limit."""
        seeds, self.hostile = self.reader.seeds(), self.reader.evil()
        for seed in seeds:
            self.give(seed)
        self.findings.clear()
        outcomes = [self.give(seed) for seed in seeds]
        if "accepted" not in outcomes or "failed" in outcomes:
            sys.exit(f"{self.name}: valid inputs were {outcomes}; {list(self.findings.values())}")
        for kept in self.folder.glob(f"finding-{self.name}-*"):
            kept.unlink()
        self.counts.clear()
        self.findings.clear()
        self.slowest, self.grown = 0.0, 0
        return seeds

    def give_hostile(self) -> list[bytes]:
        """The hostile inputs, given once; all have to be refused. Returns the small ones."""
        for label, content in self.hostile.items():
            if self.give(content, label) == "accepted":
                self._keep(f"{label}: accepted", content, label)
        if (self.folder / "ran").exists():
            self._keep("code ran", b"", "")
        return [content for content in self.hostile.values() if len(content) < 5000]

    def _keep(self, fault: str, content: bytes, label: str) -> None:
        kind = fault.split(" for ")[0].rstrip("0123456789 MB")
        if kind not in self.findings:
            digest = hashlib.sha256(content).hexdigest()[:12]
            (self.folder / f"finding-{self.name}-{digest}{self.reader.suffix}").write_bytes(content)
            self.findings[kind] = f"{label} {digest}: {fault}"

    def write(self) -> None:
        extremes = {"slowest_cpu_s": round(self.slowest, 3), "memory_growth_mb": self.grown >> 20}
        report = {**self.counts, "findings": list(self.findings.values()), **extremes}
        unfinished = self.folder / f".{self.name}.part"
        unfinished.write_text(json.dumps(report))
        os.replace(unfinished, self.folder / f"{self.name}.json")


def _signature(error: BaseException) -> str:
    """The kind of error and where it arose, the same for all inputs that end there."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "rwkv_dpo" in frame.filename or "RWKV-v5" in frame.filename
    ]
    cause = error.__cause__ or error.__context__
    return (
        f"{type(error).__name__} at {'/'.join(ours[-2:])}" + (f" from {type(cause).__name__}" if cause else "") + f": {str(error)[:150]!r}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", choices=readers.READERS, nargs="+", metavar="READER")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--engine", choices=("seeded", "atheris"), default="seeded", help="atheris takes one reader")
    flags = parser.parse_args()
    os.chdir(flags.folder)
    if flags.engine == "atheris":
        import atheris

        _instrument(atheris)
    guard = Guard()
    runs = {name: Run(name, flags.folder, guard) for name in flags.readers}
    pools = {name: run.warm_up() for name, run in runs.items()}
    guard.limit_memory()
    for name, run in runs.items():
        draw, pool = random.Random(f"{name}/{flags.seed}"), pools[name] + run.give_hostile()
        total = sum(run.counts.values()) + flags.runs

        def one(content: bytes, run: Run = run, total: int = total) -> None:
            run.give(content)
            if sum(run.counts.values()) % 200 == 0 or sum(run.counts.values()) >= total:
                run.write()

        run.write()
        if flags.engine == "atheris":
            _fuzz_with_atheris(one, run.reader, pool, flags.folder / f"corpus-{name}", flags.runs, flags.seed)
        for _ in range(flags.runs):
            one(changed(run.reader, draw.choice(pool), draw))
        run.write()


def changed(reader: readers.Reader, content: bytes, draw: random.Random) -> bytes:
    """The input changed as the reader's format allows, or where it is broken too much for that, by its bytes."""
    try:
        return reader.mutate(content, draw)
    except Exception:
        return mutations.some_bytes(content, draw)


def _instrument(atheris) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("rwkv_dpo."):
            for key, value in list(vars(module).items()):
                if type(value).__name__ == "function" and value.__module__ == name:
                    setattr(module, key, atheris.instrument_func(value))


def _fuzz_with_atheris(one, reader: readers.Reader, pool: list[bytes], corpus: Path, runs: int, seed: int) -> None:
    """libFuzzer chooses which inputs to go on from, by the branches they take; changes are the reader's own or its. It ends the process."""
    import atheris

    corpus.mkdir(exist_ok=True)
    for i, content in enumerate(pool):
        (corpus / str(i)).write_bytes(content)

    def mutate(content: bytes, max_size: int, seed: int) -> bytes:
        draw = random.Random(seed)
        mutated = changed(reader, content, draw) if draw.random() < 0.7 else atheris.Mutate(content, max_size)
        return mutated[:max_size]

    arguments = [
        f"-runs={runs}",
        f"-seed={seed + 1}",
        "-rss_limit_mb=0",
        "-max_len=20000",
        "-print_final_stats=0",
        "-verbosity=0",
    ]
    atheris.Setup(["fuzz", *arguments, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
