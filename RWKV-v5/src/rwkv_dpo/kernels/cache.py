"""The folder of compiled kernels and of what is known about them: one of this user alone, whose files have the bytes that were written."""

import os
import stat
from pathlib import Path

from rwkv_dpo.base.errors import InputError
from rwkv_dpo.files.hashed import fault_of, hashed_write

ANOTHER_FOLDER = "TORCH_EXTENSIONS_DIR names another"


class BuildError(RuntimeError):
    """A kernel that can't be built or loaded; the message is the reason, in one line."""


def cache_folder() -> Path:
    """Made on first use, for this user alone: whoever can write there can run code here. BuildError when it can't be had."""
    folder = _cache_root().absolute() / (f"rwkv_dpo-{os.getuid()}" if hasattr(os, "getuid") else "rwkv_dpo")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or not _is_own(status):
            raise BuildError(f"cache folder {folder} is not this user's own, and kernels in it are not trusted; {ANOTHER_FOLDER}")
        if _others_may_write(status):
            folder.chmod(0o700)
    except OSError as error:
        raise BuildError(f"cache folder {folder} can't be written: {error.strerror or error}; {ANOTHER_FOLDER}") from error
    return folder


def _cache_root() -> Path:
    if named := os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME"):
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise BuildError(f"no cache folder: this user has no home folder; {ANOTHER_FOLDER}") from error


def is_sound(path: Path) -> bool:
    """Whether a kept file may be used: this user wrote it, nobody else can write it, and it has the bytes that it was written with."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and _is_own(status) and not _others_may_write(status) and not fault_of(path)


def _is_own(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def _others_may_write(status: os.stat_result) -> bool:
    return hasattr(os, "getuid") and bool(status.st_mode & 0o022)


def keep(content: bytes, path: Path) -> None:
    """Writes a file of the cache whole, for this user alone. BuildError."""
    try:
        with hashed_write(path) as file:
            os.chmod(file.file.name, 0o600)
            file.write(content)
    except InputError as error:
        raise BuildError(f"the compiled kernel can't be kept: {error}; {ANOTHER_FOLDER}") from error
