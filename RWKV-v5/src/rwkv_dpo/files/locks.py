"""Locks on open files that the system gives back when their holder dies, however it dies."""

import os

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    def try_lock(descriptor: int) -> bool:
        """Takes the lock of an open file, which goes with the last descriptor of it; False when another has it."""
        try:
            # A byte far beyond the content: a lock on Windows keeps others from reading what is locked.
            os.lseek(descriptor, 1 << 40, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True

else:

    def try_lock(descriptor: int) -> bool:
        """Takes the lock of an open file or folder, which goes with the last descriptor of it; False when another has it.

        OSError where the file system has no locks.
        """
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
