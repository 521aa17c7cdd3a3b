"""SIGINT (Ctrl-C) and SIGTERM: what they do to a script.

Python runs a signal's handler in the main thread, between two of its instructions. A run spends most of its time within one: in a
matrix product, or waiting for a GPU or for another process that may be gone. Therefore a thread also watches, for signals that the main
thread does not get to.
"""

import functools
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Launchers pass on a Ctrl-C that the terminal has already sent to all processes: a second one this soon is the same one.
SAME_WITHIN_S = 1.0
# Time for the cleanup of an interrupted script.
PATIENCE_S = 10.0


class Interrupted(BaseException):
    """A signal asks the script to end. Not an Exception, so that no error handling swallows it."""


def interrupt(number: int) -> None:
    """The handler that ends a script from wherever it is. Raises Interrupted."""
    raise Interrupted(signal.Signals(number).name)


def interrupts() -> bool:
    """Whether a signal raises Interrupted, as it does until a run takes steps."""
    return _answer.act is interrupt


def interrupted_by() -> int:
    """The signal that has raised Interrupted, 0 if none has. The exception that arrives may be a different one: C++ makes its own of it."""
    return _answer.number if interrupts() else 0


@dataclass
class _Answer:
    """What signals currently do. `seen`: when the thread saw the first of them; `number`: the one that the main thread acted on."""

    act: Callable[[int], None]
    at_once: Callable[[], None]
    overdue: Callable[[int], None] | None
    seen: float = 0.0
    number: int = 0
    timer: threading.Timer | None = None


_answer = _Answer(lambda number: None, lambda: None, None)


def on_signals(
    act: Callable[[int], None], at_once: Callable[[], None] = lambda: None, overdue: Callable[[int], None] | None = None
) -> Callable[[], None]:
    """From now on, SIGINT and SIGTERM call `act` in the main thread. A second Ctrl-C ends the process immediately, after calling only
    `at_once`. overdue: called if the process still lives PATIENCE_S after a signal, before it is ended; None: it is not ended. Returns a
    function that restores what signals did before. Outside of the main thread, whose caller deals with signals, nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    answer, handlers = _answer, [signal.getsignal(number) for number in SIGNALS]
    descriptor = _set(_Answer(act, at_once, overdue), [_in_main_thread] * len(SIGNALS), _watched())

    def restore() -> None:
        _set(answer, handlers, descriptor)

    return restore


def leave_signals() -> None:
    """Give signals back to the system: they end the process, which has nothing left to do."""
    _set(_answer, [signal.SIG_DFL] * len(SIGNALS), -1)


def _set(answer: _Answer, handlers: list[Any], descriptor: int) -> int:
    """Returns the file descriptor that was notified of signals before."""
    global _answer
    if _answer.timer is not None:
        _answer.timer.cancel()
    _answer = answer
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)
    return signal.set_wakeup_fd(descriptor)


def _in_main_thread(number: int, frame: Any) -> None:
    # Once only: an Interrupted that came while the first one puts things away would end the script in a traceback. Processes that pass a
    # Only once: an Interrupted that arrived during the cleanup of the first one would end the script with a traceback. Processes that pass
    # a signal on to each other do send it twice.
    if not _answer.number:
        _answer.number = number
        _answer.act(number)


@functools.cache
def _watched() -> int:
    """Start the thread; returns the file descriptor that notifies it of signals."""
    here, there = socket.socketpair()
    there.setblocking(False)
    threading.Thread(target=_watch, args=(here,), name="signals", daemon=True).start()
    # A forked process has no such thread, and its signals don't concern this one.
    os.register_at_fork(after_in_child=leave_signals)
    return there.detach()


def _watch(signals: socket.socket) -> None:
    while number := signals.recv(1)[0]:
        answer, now = _answer, time.monotonic()
        if number not in SIGNALS:
            continue
        if not answer.seen:
            answer.seen = now
            if answer.overdue is not None:
                answer.timer = threading.Timer(PATIENCE_S, _end, (number, answer.overdue))
                answer.timer.daemon = True
                answer.timer.start()
        elif now - answer.seen >= SAME_WITHIN_S and number == signal.SIGINT:
            answer.at_once()
            os.write(2, b"\nstopped at once\n")
            _end(number)


def _end(number: int, tell: Callable[[int], None] = lambda number: None) -> None:
    tell(number)
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(128 + number)
