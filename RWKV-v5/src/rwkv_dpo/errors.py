"""The one error type for anything a user can put right: flags, files, rows, checkpoints."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from rwkv_dpo.packages import missing_package
from rwkv_dpo.signals import interrupt, interrupted_by, leave_signals, on_signals


class InputError(ValueError):
    """A fault in what the user gave. Its message is one line: the flag or file, what was found, what is accepted.

    Scripts print the message and exit with status 2; everything else is a bug and keeps its traceback. What a message quotes comes
    from files that may be anything: characters that would break the line or steer a terminal are escaped, the middle of a very long
    message is left out.
    """

    def __init__(self, message: str) -> None:
        # Escapes are longer than what they stand for, and a message may be too long to escape first.
        super().__init__(_shortened(_printable(_shortened(message))))


_LONGEST = 1000


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def refuse(message: str) -> NoReturn:
    """Raise InputError; lets a check read as one line."""
    raise InputError(message)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What the system refuses within (no permission, a disk that fails) becomes an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def run_script(
    main: Callable[[], None], leave: Callable[[int], NoReturn] = sys.exit, stopped: str = "nothing was written", speaks: bool = True
) -> NoReturn:
    """Runs a script's main. An InputError becomes one line on standard error and exit status 2; SIGINT (Ctrl-C) and SIGTERM become
    one, and 128 + the signal's number. leave: ends the process. stopped: what a signal leaves behind, in a few words. speaks: False
    where another process has that line to tell."""
    name, status = Path(sys.argv[0]).name, 0

    def tell(number: int) -> None:
        if speaks:
            by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            print(f"{name}: stopped by {by}: {stopped}", file=sys.stderr, flush=True)

    on_signals(interrupt, overdue=tell)
    try:
        main()
    except BaseException as error:
        # Some libraries have a handler of their own for Ctrl-C, for as long as they work.
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
        else:
            raise
    leave_signals()
    leave(status)
