"""Writing a file so that a reader, or a crash, meets the old file or the new one and never half of either."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from rwkv_dpo.base.errors import InputError
from rwkv_dpo.files.locks import try_lock

# What is being written, and what makes way for it: .NAME.ID.part and .NAME.ID.old. Earlier versions took their process's number for ID.
_REMAINS = re.compile(r"\.(?P<name>.+)\.(?:[0-9a-f]{16}|[0-9]+)\.(?P<end>part|old)")


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file beside `path` that takes its name when the block ends well, and is removed when it does not.

    The bytes are on the disk before the name moves. An OSError (folder missing or read-only, disk full) becomes InputError. What a
    process that was killed has left of `path` is removed.
    """
    path = Path(path)
    with writing(path), unfinished_file(path) as (unfinished, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)


def write_together(writers: Mapping[Path, Callable[[BinaryIO], None]]) -> None:
    """Each file as atomic_write has it; all are on the disk before the first takes its name, and they take their names in their order."""
    with contextlib.ExitStack() as stack:
        # It is unwound from its end.
        files = {path: stack.enter_context(atomic_write(path)) for path in reversed(list(writers))}
        for path, write in writers.items():
            with writing(path):
                write(files[path])
                files[path].flush()
                os.fsync(files[path].fileno())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses within becomes an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def unfinished_file(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `path`, held so that no sweep takes it, and removed at the end if it has not taken another name."""
    sweep(path.parent, path.name)
    unfinished, file = _new_file(path)
    try:
        with file:
            yield unfinished, file
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _new_file(path: Path) -> tuple[Path, BinaryIO]:
    while True:
        unfinished = hidden_name(path, "part")
        # Exclusively: a link that lies in wait under that name is not followed.
        file = open(unfinished, "xb")  # noqa: SIM115 - the caller closes it
        _hold(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(unfinished), os.fstat(file.fileno())):
                return unfinished, file
        file.close()  # swept before it was held


def hidden_name(path: Path, end: str) -> Path:
    """A name beside `path` that no one else has."""
    # Not by the process's number: processes of two containers that share a folder may have the same.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.{end}")


def sweep(folder: Path, name: str = "") -> None:
    """Removes what writes of `name`, or of anything, that were killed have left in a folder. What a living process writes stays.

    A folder that had made way for another, which never came, takes its name again.
    """
    with contextlib.suppress(OSError):
        for remains in list(folder.iterdir()):
            match = _REMAINS.fullmatch(remains.name)
            if match and name in ("", match["name"]):
                with contextlib.suppress(OSError):
                    _remove(remains, folder / match["name"] if match["end"] == "old" else None)


def _remove(remains: Path, successor: Path | None) -> None:
    """successor: what an .old folder made way for. OSError when it can't be done, or a living process holds one of them."""
    with _held(remains):
        if successor is not None and not successor.exists():
            os.rename(remains, successor)
        elif remains.is_dir():
            shutil.rmtree(remains)
        else:
            remains.unlink()


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """A file or folder that no other process holds, from here to the end of the block. OSError when one does."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        yield  # the system doesn't open folders
        return
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        if not _hold(descriptor):
            raise BlockingIOError(f"{path} is in use")
        yield
    finally:
        os.close(descriptor)


def _hold(descriptor: int) -> bool:
    """Where the file system has no locks, everything counts as held by whoever asks."""
    try:
        return try_lock(descriptor)
    except OSError:
        return True


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside `path` that takes its name when the block ends well, and is removed when it does not.

    Its files are on the disk before the name moves. A folder of that name makes way first: a crash between the two renames
    leaves it, whole, under a hidden name. An OSError becomes InputError.
    """
    path = Path(path)
    sweep(path.parent, path.name)
    unfinished, former = hidden_name(path, "part"), hidden_name(path, "old")
    try:
        unfinished.mkdir()
        with _held(unfinished):
            yield unfinished
            for file in unfinished.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            sync_folder(unfinished)
            with _held(path) if path.exists() else contextlib.nullcontext():
                if path.exists():
                    os.rename(path, former)
                os.rename(unfinished, path)
            sync_folder(path.parent)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(former, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Puts its list of names on the disk: a rename outlives a power cut only then."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
