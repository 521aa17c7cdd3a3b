"""The one error type for anything a user can put right: flags, files, rows, checkpoints."""

from typing import NoReturn


class InputError(ValueError):
    """A fault in what the user gave. Its message is one line: the flag or file, what was found, what is accepted.

    Scripts print the message and exit with status 2; everything else is a bug and keeps its traceback.
    """


def refuse(message: str) -> NoReturn:
    """Raise InputError; lets a check read as one line."""
    raise InputError(message)
