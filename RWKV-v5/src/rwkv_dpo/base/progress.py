"""Progress of something that takes long: a bar in a terminal; elsewhere, where every state of a bar would remain, a plain line now and
then."""

import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

# Seconds between two plain lines.
EVERY_S = 30.0


class Progress:
    """For use in a with statement, which ends it. Both go to standard error.

    >>> with Progress(168, "step", every_s=0) as progress: progress.update(40, {"loss": "2.31", "tok/s": "940"})   # not in a terminal
    step 40 of 168, loss 2.31, 940 tok/s, 02:10 left
    """

    def __init__(
        self, total: int, unit: str, what: str = "", every_s: float = EVERY_S, shows: bool = True, done: int = 0, leave: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """done: number already done, of the total. leave: keep the bar when it is finished. shows: False for no output at all."""
        self.total, self.unit, self.what, self.every_s, self.clock = total, unit, what, every_s, clock
        is_bar = shows and sys.stderr.isatty()
        self.bar: Any = tqdm(
            total=total, initial=done, desc=what or None, unit=unit, leave=leave, dynamic_ncols=True, disable=not is_bar
        )  # fmt: skip
        # A line that is logged in the meantime appears above the bar.
        self.redirected = logging_redirect_tqdm() if is_bar else None
        self.speaks = shows and not is_bar
        self.first, self.done, self.told = done, done, done
        self.begin = self.spoken = clock()

    def __enter__(self) -> "Progress":
        if self.redirected:
            self.redirected.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.redirected:
            self.redirected.__exit__(None, None, None)
            self.redirected = None
        self.bar.close()

    def update(self, n: int = 1, figures: dict[str, str] | None = None) -> None:
        """So many more are done. figures: other values to show, by short names."""
        self.done += n
        if figures:
            self.bar.set_postfix(figures, refresh=False)
        self.bar.update(n)
        if self.clock() - self.spoken >= self.every_s:
            self.tell(figures)

    def tell(self, figures: dict[str, str] | None = None) -> None:
        """Print the plain line, unless it was printed already."""
        if not self.speaks or self.told == self.done:
            return
        self.told, self.spoken = self.done, self.clock()
        seconds = (self.spoken - self.begin) / (self.done - self.first) * (self.total - self.done)
        parts = [f"{self.what} {self.unit}".strip() + f" {self.done:,} of {self.total:,}"]
        # Rates are shown before their unit.
        parts += [f"{value} {name}" if "/" in name else f"{name} {value}" for name, value in (figures or {}).items()]
        parts += [f"{tqdm.format_interval(seconds)} left"] if self.done < self.total else []
        print(", ".join(parts), file=sys.stderr, flush=True)
