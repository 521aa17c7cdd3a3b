"""One run at a time in a run folder."""

import contextlib
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.files.locks import try_lock

NAME = ".lock"


class RunLock:
    """Lock of a run folder, from take() to the end of the block or of the process, however that ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._descriptor: int | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def take(self) -> None:
        """May be called repeatedly. The folder has to exist. InputError, naming the holder, if another run has it."""
        while self._descriptor is None:
            descriptor = self._open()
            try:
                is_ours = try_lock(descriptor)
            except OSError:
                is_ours = True  # a file system without locks
            if not is_ours:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                refuse(f"--proj_dir {self._path.parent}: another run is using it ({holder or 'it has just begun'})")
            # The previous holder may have removed the file after it was opened here.
            if _is_at(descriptor, self._path):
                self._descriptor = descriptor
                os.ftruncate(descriptor, 0)
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
            else:
                os.close(descriptor)

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            raise InputError(f"--proj_dir {self._path.parent}: can't be written to ({error.strerror})") from error


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False
