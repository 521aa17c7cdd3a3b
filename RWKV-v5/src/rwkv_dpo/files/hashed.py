"""Files with a sha256 beside them, in the form of sha256sum: whether a file has the bytes that were written shows at any time."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from rwkv_dpo.base.errors import reading
from rwkv_dpo.files.atomic import atomic_write, hidden_name, sync_folder, unfinished_file, writing

_CHUNK = 1 << 24


class HashedFile:
    """A binary file open for writing from its start to its end, that knows the sha256 of what went in and why it failed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()
        self.fault: OSError | None = None

    def write(self, data) -> int:
        """As a binary file has it. Raises OSError."""
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
        """As a binary file has it."""
        self.file.flush()


@contextlib.contextmanager
def hashed_write(path: str | Path) -> Iterator[HashedFile]:
    """As atomic_write, with `path`.sha256 beside it in the form of sha256sum. The file takes writes one after the other only.

    A new name has its hash before the file has it. Where the name had another file, that one's hash goes first and the new one comes last:
    a crash may leave such a file without a hash, never one beside the hash of another.
    """
    path = Path(path)
    with writing(path), unfinished_file(path) as (unfinished, file):
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
    with writing(new_path):
        _take_name(path, new_path, hash_path(path).read_text().split(" ")[0])
        hash_path(path).unlink()


def link_hashed(path: Path, new_path: Path) -> bool:
    """Gives the content of a file of hashed_write a second name in its folder. False where the file system has no hard links."""
    link = hidden_name(new_path, "part")
    try:
        os.link(path, link)
    except OSError:
        return False
    with writing(new_path):
        _take_name(link, new_path, hash_of(path))
    return True


def remove_hashed(path: Path) -> None:
    """Removes a file of hashed_write and its hash, where they exist."""
    path.unlink(missing_ok=True)
    hash_path(path).unlink(missing_ok=True)


def _take_name(path: Path, new_path: Path, sha256: str) -> None:
    if not new_path.exists():
        _write_hash(new_path, sha256)
        os.replace(path, new_path)
        sync_folder(new_path.parent)
        return
    hash_path(new_path).unlink(missing_ok=True)
    os.replace(path, new_path)
    _write_hash(new_path, sha256)


def _write_hash(path: Path, sha256: str) -> None:
    with atomic_write(hash_path(path)) as file:
        file.write(f"{sha256}  {path.name}\n".encode())


def hash_path(path: str | Path) -> Path:
    """Of the hash beside a file."""
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
        sha256 = file_sha256(path)
    except FileNotFoundError as error:
        return "has no .sha256 beside it" if Path(path).exists() else f"can't be read: {error.strerror}"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return "" if sha256 == expected else "does not have the sha256 that it was written with"


def file_sha256(path: str | Path) -> str:
    """Of what is in a file, in hexadecimal. Raises OSError."""
    return _sha256(path).hexdigest()


def path_sha256(path: str | Path) -> str:
    """Of a file, or of the files in an adapter folder; "" of what isn't there, which its reader refuses."""
    if not Path(path).exists():
        return ""
    with reading(path):
        if not Path(path).is_dir():
            return file_sha256(path)
        digest = hashlib.sha256()
        for file in sorted(one for one in Path(path).iterdir() if one.is_file() and one.suffix in (".json", ".safetensors")):
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
        return digest.hexdigest()


def _sha256(path: str | Path) -> "hashlib._Hash":
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest
