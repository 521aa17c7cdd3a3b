"""Lives of a run: train.py in processes of their own, started quickly, that a test kills."""

import contextlib
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

# What a run imports, and DeepSpeed when it begins to train: of this the last three take two seconds of its three.
PRELOADED = [
    "rwkv_dpo.commands.train", "rwkv_dpo.run.trainer", "deepspeed", "setuptools", "torch.utils.cpp_extension", "torch._inductor.lowering",
]  # fmt: skip
# What clocks and memory say differs from run to run.
MEASURED = ("tokens_per_s", "peak_memory_gb")


def nothing() -> None:
    pass


def hang(target: str, call: int = 1, in_c: bool = False) -> None:
    """Has the call of that number of a function, named as module:path, print HANGING and never return; in_c: where no handler of a
    signal runs."""
    module, path = target.split(":")
    *parents, name = path.split(".")
    owner = functools.reduce(getattr, parents, importlib.import_module(module))
    function, calls = getattr(owner, name), []

    def hanging(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) < call:
            return function(*arguments, **named)
        os.write(1, b"HANGING\n")
        if in_c:
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
        time.sleep(600)
        raise AssertionError("no signal came")

    setattr(owner, name, hanging)


def _enter(folder: Path, limit: int | None) -> None:
    os.chdir(folder)
    if limit is not None:
        import resource  # not on every system

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def _speak_into(output: Path, errors: Path) -> None:
    os.setsid()
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def _script(path: Path, arguments: list[str], output: Path, errors: Path, prepare: Callable[[], None]) -> None:
    """A script, as the user who runs it has it, in a process group of its own."""
    _speak_into(output, errors)
    prepare()
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def _live(flags: list[str], rank: int, world_size: int, port: int, log: Path, prepare: Callable[[], None]) -> None:
    """One process of a run, among world_size as torchrun would start them, in a process group of its own."""
    _speak_into(log, log)
    if world_size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "lives"}
    from pytorch_lightning.utilities import rank_zero_only
    from rwkv_dpo.commands import train
    from rwkv_dpo.training import run_report
    run_report.as_png = lambda title, shown: b""  # a picture takes half a second
    prepare()
    rank_zero_only.rank = rank  # Lightning read it when it was imported, before there were ranks
    train.run(flags)


class Lives:
    """Starts processes from one that has imported everything and nothing else: in a tenth of the time, on a thread each."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        # The server finds its imports by PYTHONPATH alone; what it starts inherits its environment.
        variables = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        forkserver.ensure_running()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def start(self, flags: list[str], log: Path, world_size: int = 1, prepare: Callable[[], None] = nothing,
              own: Sequence[list[str]] = ()) -> list:  # fmt: skip
        """prepare: a function of a module's top level, called in each process before the run. own: by rank, flags that it has beside
        or instead of those of all."""
        port = free_port()
        of_rank = [flags + (own[rank] if own else []) for rank in range(world_size)]
        ranks = range(world_size)
        runs = [self.context.Process(target=_live, args=(of_rank[rank], rank, world_size, port, log, prepare)) for rank in ranks]
        for run in runs:
            run.start()
        return runs

    def start_script(self, path: Path, arguments: list[str], log: Path, prepare: Callable[[], None] = nothing) -> Any:
        process = self.context.Process(target=_script, args=(path, arguments, log, log, prepare))
        process.start()
        return process

    def script(self, path: Path, arguments: Sequence[object], folder: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
        """One that has ended, as subprocess.run tells of it. folder: where the user is; limit: bytes of a file, the largest."""
        given = list(map(str, arguments))
        with tempfile.TemporaryDirectory() as said:
            output, errors = Path(said, "output"), Path(said, "errors")
            process = self.context.Process(target=_script, args=(path, given, output, errors, functools.partial(_enter, folder, limit)))
            process.start()
            process.join(200)
            assert not process.is_alive(), errors.read_text()
            return subprocess.CompletedProcess(given, process.exitcode or 0, output.read_text(), errors.read_text())

    def whole(self, flags: list[str], log: Path, world_size: int = 1) -> list[int]:
        """Exit statuses of a run that nobody kills."""
        return self.end(self.start(flags, log, world_size), log)

    def end(self, runs: list, log: Path) -> list[int]:
        """Exit statuses of started processes, once they have ended."""
        for run in runs:
            run.join(200)
            assert not run.is_alive(), log.read_text()
        return [run.exitcode for run in runs]

    def trained(self, flags: list[str], log: Path, world_size: int = 1) -> str:
        """What a run printed that nobody kills and that ends well."""
        assert self.whole(flags, log, world_size) == [0] * world_size, log.read_text()[-5000:]
        return log.read_text()

    def killed(self, flags: list[str], folder: Path, log: Path, chance: random.Random, world_size: int = 1, kills: int = 1,
               number: signal.Signals = signal.SIGKILL) -> list[str]:  # fmt: skip
        """A run that dies `kills` times and is started again each time until its end: what each kill fell into, "step" or "save".

        A life is killed some steps after its beginning, in every other case as soon as a save is under way after that.
        """
        fell_into: list[str] = []
        while True:
            runs = self.start(flags, log, world_size)
            if len(fell_into) < kills and _wait_for_a_moment(runs, folder, chance, wants_save=len(fell_into) % 2 == 1):
                fell_into.append("save" if any((folder / "last").glob(".*.part")) else "step")
                for run in runs:
                    os.kill(run.pid, number)
            self.end(runs, log)
            if (folder / "rwkv-final.pth").exists():
                return fell_into
            assert len(fell_into) == kills or runs[0].exitcode in (-number, 0), log.read_text()[-3000:]


def free_port() -> int:
    """Below the range that connections take theirs from: a port of that range may be gone before it is used."""
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def _wait_for_a_moment(runs: list, folder: Path, chance: random.Random, wants_save: bool) -> bool:
    """False when the run ends first."""
    n_steps = chance.randint(1, 6)
    begin = None
    while all(run.is_alive() for run in runs):
        n = steps_written(folder)
        # A resumed life first takes lines away; one that starts anew, the whole file.
        begin = n if begin is None or n < begin else begin
        if n - begin >= n_steps and (not wants_save or any((folder / "last").glob(".*.part"))):
            time.sleep(0 if wants_save else chance.uniform(0, 0.03))
            return True
        time.sleep(0.0005)
    return False


def steps_written(folder: Path) -> int:
    """0 as well at the moment when a life that starts anew sets metrics.jsonl aside."""
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def records(folder: Path) -> list[dict]:
    """metrics.jsonl without what differs from run to run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def wait_until(is_so: Callable[[], bool], processes: list, log: Path) -> None:
    """For something that the processes do while they live."""
    while not is_so():
        time.sleep(0.002)
        assert all(process.is_alive() for process in processes), log.read_text()


def wait_for_hang(processes: list, log: Path) -> None:
    wait_until(lambda: log.exists() and log.read_text().count("HANGING\n") == len(processes), processes, log)
