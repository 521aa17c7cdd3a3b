"""The run folder (--proj_dir): config.json, checkpoints, and what earlier runs left there."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

from rwkv_dpo.atomic import atomic_write
from rwkv_dpo.config import RunConfig
from rwkv_dpo.errors import refuse

# Settings that leave a run's result as it is.
_INCIDENTAL = ("overwrite", "wandb", "enable_progress_bar", "cpu_malloc", "wkv_backend", "accelerator")
# Settings that a continuation of a run changes.
_CONTINUATION = ("load_model", "epoch_begin", "epoch_count", "my_pile_stage", "my_exit", "warmup_steps")


def prepare_folder(config: RunConfig) -> None:
    """Makes the folder and writes config.json; refuses a folder that can't be written, or that holds another run.

    What a run that is repeated would write again is set aside under the next free number, never lost.
    """
    folder = Path(config.proj_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--proj_dir {folder}: can't be made ({error.strerror})")
    if not os.access(folder, os.W_OK):
        refuse(f"--proj_dir {folder}: can't be written to")
    settings = asdict(config)
    before = _read_config(folder / "config.json")
    if before is not None and not config.overwrite:
        continues = config.epoch_begin > 0 or config.my_pile_stage >= 2
        free = _INCIDENTAL + _CONTINUATION if continues else _INCIDENTAL
        known = {name: value for name, value in before.items() if name not in free}
        changed = [f"--{name} {settings.get(name)} (was {value})" for name, value in known.items() if settings.get(name) != value]
        if changed:
            refuse(f"--proj_dir {folder} holds a run with other settings: {', '.join(changed[:5])}; --overwrite 1 goes on all the same")
    if not config.epoch_begin:
        for name in ("metrics.jsonl", "valid.jsonl"):
            _set_aside(folder / name)
    with atomic_write(folder / "config.json") as file:
        file.write(json.dumps(settings, indent=1).encode())


def save_vocabulary(characters: str, path: Path) -> None:
    """Token id -> character of a corpus of characters, as RWKV-LM's scripts read it: JSON in UTF-16LE."""
    with atomic_write(path) as file:
        file.write(json.dumps(dict(enumerate(characters)), ensure_ascii=False).encode("utf-16le"))


def newest_epoch(folder: Path) -> int | None:
    """The largest N of the folder's rwkv-N.pth, -1 for rwkv-init.pth alone, None for neither."""
    numbers = [int(match[1]) for path in folder.glob("rwkv-*.pth") if (match := re.fullmatch(r"rwkv-(\d+)\.pth", path.name))]
    if numbers:
        return max(numbers)
    return -1 if (folder / "rwkv-init.pth").exists() else None


def _read_config(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"{path}: not readable as JSON ({error})")
    return settings if isinstance(settings, dict) else refuse(f"{path}: not a JSON object")


def _set_aside(path: Path) -> None:
    if path.exists():
        number = next(n for n in range(1, 10**6) if not path.with_suffix(f".{n}{path.suffix}").exists())
        path.rename(path.with_suffix(f".{number}{path.suffix}"))
