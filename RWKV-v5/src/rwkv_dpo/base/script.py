"""How every script runs and ends: an InputError, a signal or a missing package becomes one line and a status."""

import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rwkv_dpo.base.errors import InputError
from rwkv_dpo.base.libraries import ROOT, is_checkout, what_installs
from rwkv_dpo.base.signals import interrupt, interrupted_by, leave_signals, on_signals

CONSOLE = "rwkv-dpo"


def program() -> str:
    """What was typed to start this program, as help and messages name it: `train.py`, or `rwkv-dpo train`."""
    path = Path(sys.argv[0])
    is_console = path.stem == CONSOLE or path.parts[-2:] == ("rwkv_dpo", "__main__.py")
    return " ".join([CONSOLE, *sys.argv[1:2]]) if is_console else path.name


def run_script(
    main: Callable[[], object], leave: Callable[[int], NoReturn] = sys.exit, stopped: str = "nothing was written", speaks: bool = True,
    name: str = "",
) -> NoReturn:  # fmt: skip
    """Runs a script's main. An InputError becomes one line on standard error and exit status 2; SIGINT (Ctrl-C) and SIGTERM become one, and
    128 + the signal's number. A reader of standard output that leaves early ends it without a line. leave: ends the process. stopped: what
    a signal leaves behind, in a few words. speaks: False if another process prints that line. name: the program's name, if it is not
    program()."""
    name, status = name or program(), 0

    def tell(number: int) -> None:
        if speaks:
            by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            print(f"{name}: stopped by {by}: {stopped}", file=sys.stderr, flush=True)

    on_signals(interrupt, overdue=tell)
    try:
        main()
        sys.stdout.flush()
    except BaseException as error:
        # Some libraries install their own handler for Ctrl-C while they work.
        number = interrupted_by() or (signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0)
        if number:
            tell(number)
            status = 128 + number
        elif isinstance(error, InputError):
            print(f"{name}: {error}", file=sys.stderr)
            status = 2
        elif isinstance(error, ModuleNotFoundError):
            print(f"{name}: {missing_package(error)}", file=sys.stderr)
            status = 2
        elif isinstance(error, BrokenPipeError) and _nobody_reads():
            # As of `| head`, which has what it wanted. What Python still flushes goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + signal.SIGPIPE
        else:
            raise
    leave_signals()
    leave(status)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has closed it. Windows can't tell."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def missing_package(error: ModuleNotFoundError) -> str:
    """The line to print. Re-raises the error if a module of our own is missing."""
    package = (error.name or str(error)).partition(".")[0]
    if package in ("", "rwkv_dpo"):
        raise error
    activate = ROOT / ".venv" / "bin" / "activate"
    if is_checkout() and activate.is_file() and Path(sys.prefix).resolve() != activate.parents[1].resolve():
        advice = f"activate the environment first: source {activate}"
    else:
        what = f"pip install -r {ROOT / 'requirements.txt'}" if is_checkout() else what_installs(package)
        advice = f"install it: {sys.executable} -m {what}"
    return f"the Python package {package} is missing in {sys.executable}; {advice}"


def leave_without(error: ModuleNotFoundError) -> NoReturn:
    """End a script whose imports fail, as run_script would."""
    print(f"{program()}: {missing_package(error)}", file=sys.stderr)
    sys.exit(2)
