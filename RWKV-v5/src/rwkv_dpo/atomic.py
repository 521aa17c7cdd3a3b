"""Writing a file so that a reader, or a crash, meets the old file or the new one and never half of either."""

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_dpo.errors import InputError

_CHUNK = 1 << 24


class _Hashed:
    """A binary file open for writing from its start to its end, that knows the sha256 of what went in and why it failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.fault: OSError | None = None

    def write(self, data) -> int:
        try:
            written = self.file.write(data)
        except OSError as error:
            # torch.save reports a full disk as a RuntimeError of its own.
            self.fault = error
            raise
        self.sha256.update(data)
        return written

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a binary file beside `path` that takes its name when the block ends well, and is removed when it does not.

    The bytes are on the disk before the name moves. An OSError (folder missing or read-only, disk full) becomes InputError. What a
    process that was killed has left of `path` is removed.
    """
    path = Path(path)
    with _one_line(path), _unfinished(path) as unfinished:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def hashed_write(path: str | Path) -> Iterator[BinaryIO]:
    """As atomic_write, with `path`.sha256 beside it in the form of sha256sum. The file takes writes one after the other only.

    The old hash goes before the name moves and the new one comes after: a crash may leave a whole file without a hash, never
    one beside the hash of another.
    """
    path = Path(path)
    with _one_line(path), _unfinished(path) as unfinished:
        with open(unfinished, "wb") as file:
            hashed = _Hashed(file)
            try:
                yield hashed  # type: ignore[misc]  # all of BinaryIO that torch.save uses
                file.flush()
                os.fsync(file.fileno())
            except RuntimeError as error:
                raise hashed.fault or error from error
        hash_path(path).unlink(missing_ok=True)
        os.replace(unfinished, path)
        with atomic_write(hash_path(path)) as file:
            file.write(f"{hashed.sha256.hexdigest()}  {path.name}\n".encode())


def hash_path(path: str | Path) -> Path:
    path = Path(path)
    return path.with_name(f"{path.name}.sha256")


def fault_of(path: str | Path) -> str:
    """What is wrong with a file that hashed_write wrote, in a few words; "" when it has the bytes that were written."""
    digest = hashlib.sha256()
    try:
        expected = hash_path(path).read_text(errors="replace").split(" ")[0]
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError as error:
        return "has no .sha256 beside it" if Path(path).exists() else f"can't be read: {error.strerror}"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return "" if digest.hexdigest() == expected else "does not have the sha256 that it was written with"


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _unfinished(path: Path) -> Iterator[Path]:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove_remains(path)
    try:
        yield unfinished
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
