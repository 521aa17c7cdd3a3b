"""The one error type for anything a user can put right: flags, files, rows, checkpoints."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class InputError(ValueError):
    """A fault in what the user gave. Its message is one line: the flag or file, what was found, what is accepted.

    Scripts print the message and exit with status 2; everything else is a bug and keeps its traceback.
    """


def refuse(message: str) -> NoReturn:
    """Raise InputError; lets a check read as one line."""
    raise InputError(message)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main; an InputError becomes one line on standard error and exit status 2."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
