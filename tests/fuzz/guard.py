"""What a reader may do while it reads: no code of the file's, no other file, no more memory than the file's size explains."""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Address space beyond what the process has at the start: a request that is larger fails at once, and is a finding.
ROOM = 1 << 30
# CPU seconds an input may take.
SECONDS = 10
# Resident memory that an input may add: an allowance for what any first call keeps, and so many bytes for each byte of the input.
ALWAYS, PER_BYTE, PER_PACKED_BYTE = 24 << 20, 64, 64 * 200
_FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.putenv",
    "subprocess.Popen", "socket.", "shutil.", "pickle.find_class", "webbrowser.", "urllib.", "ftplib.", "winreg.",
)  # fmt: skip
# What is read besides the input: the interpreter, its packages, and what the system tells.
_READABLE = (*(os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__))), "/proc", "/sys", "/dev")


class TooSlow(BaseException):
    """The input used up its CPU seconds. No Exception, so that no reader takes it for a fault of the file."""


class Guard:
    """`watch` surrounds each input; afterwards `violations` says what it did that it must not, `grown` how many bytes it added."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self.grown = 0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)
        self._input: str | None = None
        self._roots: set[str] = set()
        # Asked for now: tempfile looks for it once, under a lock, with opens of its own.
        self._scratch = os.path.realpath(tempfile.gettempdir())
        self._readable = (*_READABLE, str(Path(__file__).resolve().parents[2]))
        sys.addaudithook(self._audit)
        signal.signal(signal.SIGVTALRM, _too_slow)

    def limit_memory(self) -> None:
        """From here on imports of new packages are violations, and so is more memory."""
        self._roots = {name.split(".")[0] for name in sys.modules} | {"encodings", "unicodedata"}
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + ROOM, in_use + ROOM))

    @contextlib.contextmanager
    def watch(self, path: Path, n_bytes: int, is_packed: bool) -> Iterator[None]:
        self.violations = []
        # What earlier inputs left behind would hide what this one takes. From here on the kernel keeps the peak anew.
        self._trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak_memory()
        self._input = os.path.realpath(path.parent)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            self._input = None
            self.grown = _peak_memory() - before
            if self.grown > ALWAYS + (PER_PACKED_BYTE if is_packed else PER_BYTE) * n_bytes:
                self.violations.append(f"memory: {self.grown >> 20} MB for {n_bytes} bytes")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._input is None:
            return
        if event.startswith(_FORBIDDEN):
            self.violations.append(f"code: {event} {arguments!r}"[:300])
            raise PermissionError(f"forbidden: {event}")
        if event == "import" and arguments[0].split(".")[0] not in self._roots:
            self.violations.append(f"import of {arguments[0]}")
        elif event == "open":
            self._check_open(arguments[0], arguments[2] or 0)

    def _check_open(self, path: object, flags: int) -> None:
        if isinstance(path, int):
            return
        place = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
        is_writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if is_writing and not place.startswith(self._scratch):
            self.violations.append(f"write: {place}")
        elif not place.startswith((self._input or "", self._scratch, *self._readable)):
            self.violations.append(f"read: {place}")


def asked_for_too_much(error: BaseException | None) -> bool:
    """Whether an allocation failed on the way to this error."""
    while error is not None:
        # Python's own parser says MemoryError of text that is too deep for it.
        in_parser = any(frame.filename.endswith("ast.py") for frame in traceback.extract_tb(error.__traceback__)[-1:])
        if (isinstance(error, MemoryError) and not in_parser) or "allocate memory" in str(error) or "malloc of size" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _too_slow(*_: object) -> None:
    raise TooSlow


def _peak_memory() -> int:
    # Not getrusage, which begins with the peak of the process that started this one.
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")) * 1024
