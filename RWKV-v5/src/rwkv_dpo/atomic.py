"""Writing a file so that a reader, or a crash, meets the old file or the new one and never half of either."""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from rwkv_dpo.errors import InputError
from rwkv_dpo.locks import try_lock

_CHUNK = 1 << 24
# What is being written, and what makes way for it: .NAME.ID.part and .NAME.ID.old. Earlier versions took their process's number for ID.
_REMAINS = re.compile(r"\.(?P<name>.+)\.(?:[0-9a-f]{16}|[0-9]+)\.(?P<end>part|old)")


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
    with _one_line(path), _unfinished(path) as (unfinished, file):
        yield file
        file.flush()
        os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)


def write_together(writers: Mapping[Path, Callable[[BinaryIO], None]]) -> None:
    """Each file as atomic_write has it; all are on the disk before the first takes its name, and they take their names in their order."""
    with contextlib.ExitStack() as stack:
        # It is unwound from its end.
        files = {path: stack.enter_context(atomic_write(path)) for path in reversed(list(writers))}
        for path, write in writers.items():
            with _one_line(path):
                write(files[path])
                files[path].flush()
                os.fsync(files[path].fileno())


@contextlib.contextmanager
def hashed_write(path: str | Path) -> Iterator[HashedFile]:
    """As atomic_write, with `path`.sha256 beside it in the form of sha256sum. The file takes writes one after the other only.

    The old hash goes before the name moves and the new one comes after: a crash may leave a whole file without a hash, never
    one beside the hash of another.
    """
    path = Path(path)
    with _one_line(path), _unfinished(path) as (unfinished, file):
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


def link_hashed(path: Path, new_path: Path) -> bool:
    """Gives the content of a file of hashed_write a second name in its folder. False where the file system has no hard links."""
    link = _hidden(new_path, "part")
    try:
        os.link(path, link)
    except OSError:
        return False
    with _one_line(new_path):
        _take_name(link, new_path, hash_of(path))
    return True


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


def hash_of(path: str | Path) -> str:
    """The sha256 that hashed_write put beside a file, "" without."""
    try:
        return hash_path(path).read_text(errors="replace").split(" ")[0]
    except FileNotFoundError:
        return ""


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
def _unfinished(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
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
        unfinished = _hidden(path, "part")
        # Exclusively: a link that lies in wait under that name is not followed.
        file = open(unfinished, "xb")  # noqa: SIM115 - the caller closes it
        _hold(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(unfinished), os.fstat(file.fileno())):
                return unfinished, file
        file.close()  # swept before it was held


def _hidden(path: Path, end: str) -> Path:
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
    unfinished, former = _hidden(path, "part"), _hidden(path, "old")
    try:
        unfinished.mkdir()
        with _held(unfinished):
            yield unfinished
            for file in unfinished.iterdir():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            _sync_folder(unfinished)
            with _held(path) if path.exists() else contextlib.nullcontext():
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
    # A rename outlives a power cut only when the folder that lists it is flushed too.
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
