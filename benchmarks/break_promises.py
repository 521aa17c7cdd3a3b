#!/usr/bin/env python3
"""Breaks the mechanism behind each promise and sees whether its tests notice, into benchmarks/results/promises.json.

    python benchmarks/break_promises.py [--only torch-save-zip fsync-file ...] [--jobs 2] [--stand_in]

benchmarks/promises.toml has for every promise what it says, the source that keeps it, a replacement that doesn't, and the tests that
must go red. Those of the stand-in for a GPU, which takes a download of gigabytes, are run with --stand_in alone. Status 1 when a break
survives. Python 3.11 or later.
"""

import argparse
import re
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

import tomllib
from mutate import ROOT, copy_checkout, import_once, run_tests

TABLE = Path(__file__).with_name("promises.toml")
TIMEOUT = 300.0
Promise = dict[str, Any]


def read_table() -> dict[str, Promise]:
    return tomllib.loads(TABLE.read_text())


def broken(promise: Promise, root: Path) -> str:
    """The file's text without the mechanism. ValueError when the table is behind the source."""
    text = (root / promise["file"]).read_text()
    if text.count(promise["text"]) != 1:
        raise ValueError(f"{promise['file']} has {text.count(promise['text'])} times what is to be replaced, instead of once")
    return text.replace(promise["text"], promise["broken"])


def try_break(name: str, promise: Promise, copies: Queue) -> dict[str, Any]:
    copy = copies.get()
    path = copy / promise["file"]
    original = path.read_text()
    try:
        path.write_text(broken(promise, copy))
        status, seconds = run_tests(copy, promise["tests"], TIMEOUT)
        output = (copy / "output.txt").read_text(errors="replace")
    finally:
        path.write_text(original)
        copies.put(copy)
    row = {"promise": promise["promise"], "outcome": outcome(status, output), "seconds": round(seconds, 1)}
    print(f"{name}: {row['outcome']}, {seconds:.0f} s", flush=True)
    if row["outcome"] not in ("red", "hung"):
        print(output[-2000:], flush=True)
    return row


def outcome(status: int | None, output: str) -> str:
    """red: a test failed, or took Python down. A break that keeps tests from being collected shows nothing, nor do tests that are
    skipped."""
    if status is None:
        return "hung"
    if status == 1 or status < 0:
        return "red"
    if status:
        return "NO TEST RAN"
    return "SURVIVED" if re.search(r"\d+ passed", output) else "SKIPPED"


def fail_unbroken(promises: dict[str, Promise], copies: Queue) -> set[str]:
    """Promises whose tests fail on the code as it is: their breaks would show nothing."""
    copy = copies.get()
    tests = sorted({test for promise in promises.values() for test in promise["tests"]})
    _, seconds = run_tests(copy, ["--maxfail=1000", *tests], 3600)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", (copy / "output.txt").read_text(errors="replace"), re.MULTILINE)
    print(f"unbroken: {len(tests)} tests, {seconds:.0f} s; red: {', '.join(failed) or 'none'}", flush=True)
    copies.put(copy)
    return {name for name, promise in promises.items() if any(one.startswith(test) for one in failed for test in promise["tests"])}


def main() -> None:
    table = read_table()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=table, default=list(table), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--stand_in", action="store_true", help="those that need the stand-in for a GPU as well")
    args = parser.parse_args()
    promises = {name: table[name] for name in args.only if args.stand_in or "needs" not in table[name]}
    for name, promise in promises.items():
        try:
            broken(promise, ROOT)
        except ValueError as error:
            sys.exit(f"{name}: {error}")
    import_once()
    from measure import save

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        copies: Queue = Queue()
        for i in range(args.jobs):
            copies.put(copy_checkout(Path(folder, str(i))))
        bad = fail_unbroken(promises, copies)
        sound = {name: promise for name, promise in promises.items() if name not in bad}
        for name, row in zip(sound, pool.map(lambda name: try_break(name, sound[name], copies), sound), strict=True):
            save("promises", {name: row})
            bad |= set() if row["outcome"] in ("red", "hung") else {name}
    sys.exit(f"not noticed, or red unbroken: {', '.join(sorted(bad))}" if bad else 0)


if __name__ == "__main__":
    main()
