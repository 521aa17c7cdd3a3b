"""JSON as every reader of it takes it (Python's own writer spells NaN and infinities, which JSON doesn't know), and the last line of a
log that a power cut, or a kill in mid-write, left without its end."""

import json
import math
import os
from pathlib import Path
from typing import Any

# Lines of our logs are far shorter; more without a line end is no line of ours.
_LONGEST = 1 << 20


def as_json(value: Any, **options: Any) -> str:
    """The value as json.dumps writes it with these options, numbers that are not finite as null."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def mend_last_line(path: Path) -> None:
    """Ends the last line of a log, so that what is appended becomes a line of its own. What can't be read any more (JSON that breaks
    off in a .jsonl file, zeros that a file system leaves) is taken away. Raises OSError."""
    if not path.exists() or not (size := path.stat().st_size):
        return
    with open(path, "r+b") as file:
        file.seek(max(size - _LONGEST, 0))
        _, _, rest = file.read().rpartition(b"\n")
        if not rest:
            return
        if _is_whole(rest, path):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(size - len(rest))


def _is_whole(line: bytes, path: Path) -> bool:
    if b"\0" in line:
        return False
    if path.suffix != ".jsonl":
        return True
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
