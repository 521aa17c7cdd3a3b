"""Writing a file so that a reader, or a crash, meets the old file or the new one and never half of either."""

import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_dpo.errors import InputError

_CHUNK = 1 << 24


class HashedFile:
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

    def fill(self, write: Callable[[str], None]) -> None:
        """For writers that take a path: write(path) makes all of the file."""
        write(self.file.name)
        self.sha256 = _sha256(self.file.name)

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
def hashed_write(path: str | Path) -> Iterator[HashedFile]:
    """As atomic_write, with `path`.sha256 beside it in the form of sha256sum. The file takes writes one after the other only.

    The old hash goes before the name moves and the new one comes after: a crash may leave a whole file without a hash, never
    one beside the hash of another.
    """
    path = Path(path)
    with _one_line(path), _unfinished(path) as unfinished:
        with open(unfinished, "wb") as file:
            hashed = HashedFile(file)
            try:
                yield hashed
                file.flush()
                os.fsync(file.fileno())
            except RuntimeError as error:
                raise hashed.fault or error from error
        _take_name(unfinished, path, hashed.sha256.hexdigest())


def rename_hashed(path: Path, new_path: Path) -> None:
    """Gives a file of hashed_write another name in its folder, and its hash with it."""
    with _one_line(new_path):
        _take_name(path, new_path, hash_path(path).read_text().split(" ")[0])
        hash_path(path).unlink()


def remove_hashed(path: Path) -> None:
    """Removes a file of hashed_write and its hash, where they exist."""
    path.unlink(missing_ok=True)
    hash_path(path).unlink(missing_ok=True)


def _take_name(path: Path, new_path: Path, sha256: str) -> None:
    hash_path(new_path).unlink(missing_ok=True)
    os.replace(path, new_path)
    with atomic_write(hash_path(new_path)) as file:
        file.write(f"{sha256}  {new_path.name}\n".encode())


def hash_path(path: str | Path) -> Path:
    path = Path(path)
    return path.with_name(f"{path.name}.sha256")


def fault_of(path: str | Path) -> str:
    """What is wrong with a file that hashed_write wrote, in a few words; "" when it has the bytes that were written."""
    try:
        expected = hash_path(path).read_text(errors="replace").split(" ")[0]
        digest = _sha256(path)
    except FileNotFoundError as error:
        return "has no .sha256 beside it" if Path(path).exists() else f"can't be read: {error.strerror}"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return "" if digest.hexdigest() == expected else "does not have the sha256 that it was written with"


def _sha256(path: str | Path) -> "hashlib._Hash":
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest


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
