"""The one error type for anything that a user can fix: flags, files, rows, checkpoints."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn


class InputError(ValueError):
    """An error in the user's input. Its message is one line: the flag or file, what was found, what is accepted.

    Scripts print the message and exit with status 2; any other exception is a bug and keeps its traceback. What a message quotes comes
    from files that may be anything: characters that would break the line or steer a terminal are escaped, the middle of a very long
    message is left out.
    """

    def __init__(self, message: str) -> None:
        # Escapes are longer than the characters they replace, and a message may be too long to escape first.
        super().__init__(_shortened(_printable(_shortened(message))))


_LONGEST = 1000


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def refuse(message: str) -> NoReturn:
    """Raise InputError, so that a check reads as one line."""
    raise InputError(message)


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn an error of the system within (no permission, a failing disk) into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_utf8(named: str, path: Path) -> str:
    """The text of a small file, without a byte order mark. Raises InputError, beginning with `named`, if it can't be read or isn't
    UTF-8."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise InputError(f"{named}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{named}: not UTF-8: {error.reason} at byte {error.start}") from error
