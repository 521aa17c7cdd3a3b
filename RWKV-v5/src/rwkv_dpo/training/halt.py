"""Ending a run early, on all ranks at the same step: signals, failures to write rank 0's files, and the exit itself."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytorch_lightning as pl
from typing_extensions import override

from rwkv_dpo.base.errors import InputError
from rwkv_dpo.base.signals import interrupted_by, interrupts, on_signals
from rwkv_dpo.files.json_text import mend_last_line


class Halted(Exception):
    """Ends the training. `fault`: the line that rank 0 ends with, with a status other than 0; "" is a normal end."""

    def __init__(self, message: str, fault: str = "") -> None:
        super().__init__(message or fault)
        self.message, self.fault = message, fault


@dataclass
class Halt:
    """What one rank learns and all have to act upon together."""

    signalled: bool = False
    fault: str = ""  # what rank 0 could not write
    last_good: str = ""  # what the run can continue from, for messages
    appended: set[Path] = field(default_factory=set)

    def on_signal(self, number: int) -> None:
        """Record a signal: the run stops at the end of the step."""
        self.signalled = True

    def append(self, path: Path, text: str) -> None:
        """For rank 0. A failure is kept until the ranks agree to stop."""
        try:
            if path not in self.appended:
                mend_last_line(path)
                self.appended.add(path)
            with open(path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self.fault = self.fault or f"{path}: cannot be written: {error.strerror}"

    def write(self, trainer: pl.Trainer, write: Callable[[], None]) -> None:
        """Run `write` on rank 0; all ranks call this, and leave the training if it fails, or if an earlier append did."""
        if trainer.is_global_zero and not self.fault:
            try:
                write()
            except InputError as error:
                self.fault = str(error)
        self.fault = trainer.strategy.broadcast(self.fault)
        self.check(bool(self.fault))

    def check(self, has_fault: bool) -> None:
        """Raise Halted on every rank if rank 0 has had a failure."""
        if has_fault:
            raise Halted("", f"{self.fault}; {self.last_good or 'nothing was saved to continue from'}")


# A process that Lightning starts recognizes its parent by it.
_STARTED_BY = "RWKV_DPO_STARTED_BY"


class StopOnSignal(pl.Callback):
    """Until the first step begins, a signal ends the run like any script (signals.Interrupted), including the processes that Lightning has
    started on this machine; torchrun and Slurm take care of theirs. From then on it lets the step finish: Halt.signalled. Comes after all
    callbacks that have work to do before the first step."""

    def __init__(self, halt: Halt) -> None:
        self.halt = halt
        self.restore: Callable[[], None] = lambda: None
        # Lightning's own processes have a LOCAL_RANK above 0. A script that a process starts after a run of its own inherits the other
        # variables.
        self.started_by = int(os.environ.get(_STARTED_BY, 0)) if int(os.environ.get("LOCAL_RANK", 0)) else 0
        os.environ[_STARTED_BY] = str(os.getpid())

    @override
    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        is_script = interrupts()
        restore = on_signals(self.halt.on_signal, at_once=lambda: self._pass_on(trainer, signal.SIGKILL))
        # A script has trained, whatever comes after; other callers have handlers of their own.
        if not is_script:
            self.restore = restore

    @override
    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.restore()

    @override
    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if number := interrupted_by():
            self._pass_on(trainer, number)
        self.restore()

    def _pass_on(self, trainer: pl.Trainer, number: int) -> None:
        for process in getattr(trainer.strategy.launcher, "procs", ()):
            process.send_signal(number)
        if self.started_by == os.getppid():
            os.kill(self.started_by, number)
