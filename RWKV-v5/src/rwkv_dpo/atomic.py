"""Writing a file so that a reader, or a crash, meets the old file or the new one and never half of either."""

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_dpo.errors import InputError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file beside `path` that takes its name when the block ends well, and is removed when it does not.

    The bytes are on the disk before the name moves. An OSError (folder missing or read-only, disk full) becomes InputError. What a
    process that was killed has left of `path` is removed.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _remove_remains(path)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _remove_remains(path: Path) -> None:
    for remains in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        process = remains.name.split(".")[-2]
        if process.isdecimal() and not _is_alive(int(process)):
            remains.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    # A rename outlives a power cut only when the folder that lists it is flushed too; not every system opens folders.
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
