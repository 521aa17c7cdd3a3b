#!/usr/bin/env python3
"""Changes the code a line at a time and sees whether its tests notice, into benchmarks/results/mutation.json.

    pip install cosmic-ray
    python benchmarks/mutate.py [--modules losses forest ...] [--sample 40] [--seed 0] [--jobs 2]

The changes are cosmic-ray's: operators, comparisons, numbers, booleans, loops, decorators and exceptions exchanged for others. Of each
module's a seeded sample is tried (--sample 0: all), each in a copy of the checkout, by the tests of the table below; what fails or
hangs is killed. Changes of annotations alone, which change nothing, are not counted. The file keeps every survivor, with its
explanation from benchmarks/survivors.json, where one is equivalent to the original or changes nothing that is promised.
"""

import argparse
import ast
import difflib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from queue import Queue
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path("RWKV-v5/src/rwkv_dpo")
SURVIVORS = Path(__file__).parent / "survivors.json"
# The tests that a module's promises are in, the quickest first.
RUNS = ("tests/training/test_last.py", "tests/training/test_identity.py", "tests/training/test_resume.py")
TESTS: dict[str, tuple[str, ...]] = {
    "objective/losses": ("tests/objective/test_losses.py", "tests/objective/test_objective.py"),
    "optimizer/schedule": ("tests/optimizer/test_schedule.py", "tests/run/test_config.py"),
    "batches/sampling": ("tests/batches/test_sampling.py", "tests/batches/test_batches.py"),
    "batches/forest": ("tests/batches/test_forest.py", "tests/objective/test_objective.py", "tests/model/test_v5.py"),
    "batches/step": ("tests/batches/test_forest.py", "tests/objective/test_objective.py", "tests/model/test_v5.py"),
    "batches/chunks": ("tests/objective/test_chunked_step.py", "tests/objective/test_objective.py"),
    "objective/objective": ("tests/objective/test_objective.py", "tests/objective/test_chunked_step.py"),
    "objective/chunked_step": ("tests/objective/test_chunked_step.py",),
    "evaluation/scoring": ("tests/objective/test_objective.py", "tests/evaluation/test_evaluate.py"),
    "data/pairs": ("tests/data/test_pairs.py", "tests/data/test_original_pairs.py", "tests/data/test_prepare.py"),
    "data/pair_files": ("tests/data/test_pairs.py", "tests/data/test_original_pairs.py", "tests/data/test_prepare.py"),
    "files/atomic": ("tests/files/test_atomic.py",),
    "files/hashed": ("tests/files/test_atomic.py",),
    "run_folder/resume": (RUNS[0], RUNS[2], RUNS[1]),
    "training/last": RUNS,
}
# Longer than the others together, and about the folder's stages.
DESELECTED = ("tests/training/test_resume.py::test_staged_pretraining_goes_on_within_its_epoch",)


class Mutant(NamedTuple):
    module: str
    operator: str
    text: str  # of the whole module
    change: str  # as a diff


class Outcome(NamedTuple):
    mutant: Mutant
    how: str  # killed, survived, timeout
    seconds: float


def draw_mutants(module: str, sample: int, seed: int) -> tuple[int, list[Mutant]]:
    """How many changes of a module there are, and so many of them (0: all) in a seeded order. A change that shows in annotations alone,
    or that another makes as well, is none."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    original = (ROOT / PACKAGE / f"{module}.py").read_text()
    nodes = list(ast_nodes(get_ast(original)))
    # Two operators want a variable's name.
    names = sorted(set(operator_names()) - {"core/VariableInserter", "core/VariableReplacer"})
    operators = {name: get_operator(name)() for name in names}
    places = [
        (name, occurrence)
        for name, operator in operators.items()
        for occurrence in range(sum(len(list(operator.mutation_positions(node))) for node in nodes))
    ]
    random.Random(f"{seed} {module}").shuffle(places)
    seen, found = {_bare(original)}, []
    for name, occurrence in places:
        text = mutate_code(original, operators[name], occurrence)
        if text is None or (bare := _bare(text)) in seen:
            continue
        seen.add(bare)
        lines = difflib.unified_diff(original.splitlines(), text.splitlines(), lineterm="", n=0)
        found.append(Mutant(module, name, text, "\n".join(line for line in lines if line[:3] not in ("---", "+++") and line[:2] != "@@")))
        if len(found) == sample:
            break
    return len(places), found


def _bare(text: str) -> str:
    """The code without annotations. What can't be parsed is left as it is, and won't be imported."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return text
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def run_tests(copy: Path, arguments: Sequence[str], timeout: float) -> tuple[int | None, float]:
    """Exit status of pytest in a copy of the checkout, None after a timeout, and its seconds; what it printed is in output.txt. It runs in
    a fork of this process, which has imported what takes long and nothing of the package."""
    begin = time.perf_counter()
    process = os.fork()
    if process == 0:
        os.setsid()
        os.chdir(copy)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import pytest

        status = 1
        try:
            status = pytest.main(["-x", "-n", "0", *arguments])
        finally:
            os._exit(status)
    while time.perf_counter() - begin < timeout:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.perf_counter() - begin
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None, timeout


def tests_of(module: str) -> list[str]:
    """Arguments of pytest."""
    return ["-p", "no:cacheprovider", "-m", "not slow", *(f"--deselect={test}" for test in DESELECTED), *TESTS[module]]


def try_mutants(mutants: list[Mutant], copies: Queue, timeout: float) -> list[Outcome]:
    def one(mutant: Mutant) -> Outcome:
        copy = copies.get()
        path = copy / PACKAGE / f"{mutant.module}.py"
        original = path.read_text()
        try:
            path.write_text(mutant.text)
            status, seconds = run_tests(copy, tests_of(mutant.module), timeout)
        finally:
            path.write_text(original)
            copies.put(copy)
        return Outcome(mutant, "timeout" if status is None else "survived" if status == 0 else "killed", seconds)

    with ThreadPoolExecutor(copies.qsize()) as pool:
        return list(pool.map(one, mutants))


def interval(killed: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share killed among all mutants, of which n were drawn."""
    z, share = 1.96, killed / n
    center, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (center - spread) / (1 + z * z / n), (center + spread) / (1 + z * z / n)


def campaign(module: str, args: argparse.Namespace, copies: Queue) -> dict:
    n_mutants, chosen = draw_mutants(module, args.sample, args.seed)
    copy = copies.get()
    status, seconds = run_tests(copy, tests_of(module), 600)
    if status:
        sys.exit(f"{module}: its tests fail on the code as it is:\n{(copy / 'output.txt').read_text()[-2000:]}")
    copies.put(copy)
    outcomes = try_mutants(chosen, copies, 3 * seconds + 30)
    explained = json.loads(SURVIVORS.read_text()) if SURVIVORS.exists() else {}
    survivors = [{"change": o.mutant.change, "why": explained.get(o.mutant.change, "")} for o in outcomes if o.how == "survived"]
    killed = len(chosen) - len(survivors)
    low, high = interval(killed, len(chosen))
    row = {
        "mutants": n_mutants, "tried": len(chosen), "killed": killed, "of them by a timeout": sum(o.how == "timeout" for o in outcomes),
        "share killed": round(killed / len(chosen), 3), "95 % interval": [round(low, 3), round(high, 3)], "survivors": survivors,
    }  # fmt: skip
    print(f"{module}: {killed} of {len(chosen)} killed ({n_mutants} mutants)", flush=True)
    for survivor in survivors:
        print("\n".join(f"    {line}" for line in [*survivor["change"].splitlines(), survivor["why"] or "NOT EXPLAINED"]), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--sample", type=int, default=40, help="mutants of a module; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    import_once()
    sys.path.insert(0, str(Path(__file__).parent))
    from measure import save

    with tempfile.TemporaryDirectory() as folder:
        copies: Queue = Queue()
        for i in range(args.jobs):
            copies.put(copy_checkout(Path(folder, str(i))))
        for module in args.modules:
            save("mutation", {module: {"tool": f"cosmic-ray {version('cosmic-ray')}", "seed": args.seed, **campaign(module, args, copies)}})


def import_once() -> None:
    """What takes long, for all forks."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import pytorch_lightning  # noqa: F401
    import torch  # noqa: F401


def copy_checkout(folder: Path) -> Path:
    """The checkout, with the neighbour that tests look for."""
    folder.mkdir()
    shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(".git", ".venv", ".hypothesis", "__pycache__", "demo_out"))
    if (ROOT.parent / "shared").exists():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
    return folder / "checkout"


if __name__ == "__main__":
    main()
