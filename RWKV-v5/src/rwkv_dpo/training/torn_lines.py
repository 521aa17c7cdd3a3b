"""The last line of a log that a power cut, or a kill in mid-write, left without its end."""

import json
import os
from pathlib import Path

# Lines of our logs are far shorter; more without a line end is no line of ours.
_LONGEST = 1 << 20


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
