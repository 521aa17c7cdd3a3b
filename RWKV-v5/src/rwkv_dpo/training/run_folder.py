"""The run folder (--proj_dir): config.json, checkpoints, and what earlier runs left there."""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path

from rwkv_dpo.atomic import atomic_write
from rwkv_dpo.config import RunConfig
from rwkv_dpo.errors import InputError, refuse

# Settings that leave a run's result as it is.
INCIDENTAL = (
    "proj_dir", "overwrite", "wandb", "enable_progress_bar", "cpu_malloc", "wkv_backend", "accelerator", "resume", "save_every",
    "keep", "max_bad_steps",
)  # fmt: skip
# Settings that a continuation of a run changes.
CONTINUATION = ("load_model", "epoch_begin", "epoch_count", "my_pile_stage", "my_exit", "warmup_steps", "peft_load")
# Settings that a resumed run may change: how the work is shared out, and into how many samples it is cut.
LAYOUT = ("devices", "num_nodes", "strategy", "ds_bucket_mb", "grad_cp", "chunk_ctx", "micro_bsz", "accumulate_grad_batches", "epoch_steps")
# What grows with the run.
LOGS = ("metrics.jsonl", "valid.jsonl", "train_log.txt")


def changes(before: dict, config: RunConfig, free: tuple[str, ...]) -> list[str]:
    """Settings, but for those in `free`, in which `config` differs from the run before, each as a few words."""
    settings = asdict(config)
    known = {name: value for name, value in before.items() if name not in free}
    return [f"--{name} {settings.get(name)} (was {value})" for name, value in known.items() if settings.get(name) != value]


def prepare_folder(config: RunConfig, resumes: bool) -> None:
    """Makes the folder and writes config.json; refuses a folder that can't be written, or that holds another run.

    What a run that begins anew would write again is set aside under the next free number, never lost.
    """
    folder = Path(config.proj_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--proj_dir {folder}: can't be made ({error.strerror})")
    if not os.access(folder, os.W_OK):
        refuse(f"--proj_dir {folder}: can't be written to")
    before = read_config(folder / "config.json")
    if before is not None and not config.overwrite:
        continues = config.epoch_begin > 0 or config.my_pile_stage >= 2
        changed = changes(before, config, INCIDENTAL + (LAYOUT if resumes else CONTINUATION if continues else ()))
        if changed:
            refuse(f"--proj_dir {folder} holds a run with other settings: {', '.join(changed[:5])}; --overwrite 1 goes on all the same")
    if not resumes:
        for name in ("last",) if config.epoch_begin else ("last", "metrics.jsonl", "valid.jsonl"):
            _set_aside(folder / name)
    with atomic_write(folder / "config.json") as file:
        file.write(json.dumps(asdict(config), indent=1).encode())


def final_name(config: RunConfig) -> str:
    """What a run writes last."""
    return {"none": "rwkv-final.pth", "state": "state-final.pth"}.get(config.peft, "adapter-final")


def is_finished(config: RunConfig) -> bool:
    """Whether the folder holds the end of a run with these settings."""
    folder = Path(config.proj_dir)
    before = read_config(folder / "config.json")
    if before is None or changes(before, config, INCIDENTAL) or not (folder / final_name(config)).exists():
        return False
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return bool(lines) and f'"step": {config.epoch_begin * config.steps_per_epoch + config.total_steps},' in lines[-1]


def log_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each log, which are on the disk when this returns."""
    sizes = {}
    for path in (folder / name for name in LOGS):
        if path.exists():
            try:
                with open(path, "ab") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise InputError(f"{path}: cannot be written: {error.strerror}") from error
            sizes[path.name] = path.stat().st_size
    return sizes


def cut_logs(folder: Path, sizes: dict[str, int]) -> None:
    """Takes from the logs what steps wrote that are going to be done again."""
    for path in (folder / name for name in LOGS):
        if path.exists() and path.stat().st_size > sizes.get(path.name, 0):
            os.truncate(path, sizes.get(path.name, 0))


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


def read_config(path: Path) -> dict | None:
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
