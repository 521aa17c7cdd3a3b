"""Writing a file so that a reader, or a crash, meets the old file or the new one and never half of either."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_dpo.errors import InputError


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file beside `path` that takes its name when the block ends well, and is removed when it does not.

    The bytes are on the disk before the name moves. An OSError (folder missing or read-only, disk full) becomes InputError.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
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


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its name when the block ends well, and is removed when it does not.

    Its files are on the disk before the name moves. A folder of that name makes way first: a crash between the two renames
    leaves it, whole, under a hidden name. An OSError becomes InputError.
    """
    path = Path(path)
    unfinished, former = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        _sync_folder(unfinished)
        if path.exists():
            os.rename(path, former)
        os.rename(unfinished, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    # A rename outlives a power cut only when the folder that lists it is flushed too; not every system opens folders.
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
