"""The run folder (--proj_dir): config.json, checkpoints, and what earlier runs left there."""

import json
import logging
import os
import re
from pathlib import Path

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.files.atomic import atomic_write, sweep
from rwkv_dpo.files.hashed import hash_of
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.run_folder.identity import Identity
from rwkv_dpo.run_folder.lock import RunLock
from rwkv_dpo.run_folder.settings import FolderSettings
from rwkv_dpo.settings.fields import Part

log = logging.getLogger(__name__)

# Files that grow during the run.
LOGS = ("metrics.jsonl", "valid.jsonl", "samples.jsonl", "train_log.txt")
# What a run writes under these names, a fresh run would overwrite.
_OF_A_RUN = re.compile(
    r"config\.json|wandb-run-id|tensorboard|report\.html|curves\.png|(metrics|valid|samples)\.jsonl|train_log\.txt|vocab\.json"
    r"|reference\.(save|journal.*)|last|(rwkv|state)-(init|final|best|last-good|\d+)\.pth(\.sha256)?"
    r"|adapter-(init|final|best|last-good|\d+)|(rwkv|state|adapter)-final\.json"
)
# Of those, what remains for a run that starts from rwkv-init.pth; and what records itself which pairs and weights it belongs to.
_START, _KEYED = re.compile(r"rwkv-init\.pth(\.sha256)?|vocab\.json"), re.compile(r"reference\..*")


def prepare_folder(settings: FolderSettings, identity: Identity, lock: RunLock, resumes: bool, continues: bool) -> None:
    """Makes the folder, takes it, and writes config.json; refuses a folder that can't be written, or that holds another run.

    Whatever a fresh run would overwrite is moved into earlier-N; nothing is lost. resumes: the run continues from a checkpoint of its own;
    continues: it continues the epochs of an earlier run.
    """
    folder = settings.path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--proj_dir {folder}: can't be created ({error.strerror})")
    if not os.access(folder, os.W_OK):
        refuse(f"--proj_dir {folder}: can't be written to")
    lock.take()
    before = read_identity(folder)
    free = {Part.INCIDENTAL, Part.LAYOUT if resumes else Part.CONTINUATION if continues else Part.INCIDENTAL}
    changed = identity.changes_from(before, free) if before else []
    if changed and not settings.overwrite:
        refuse(f"--proj_dir {folder} holds a run with other settings: {', '.join(changed[:5])}; --overwrite 1 uses it anyway")
    for place in (folder, folder / "last"):
        sweep(place)
    if not resumes:
        is_again = before is not None and not changed and settings.resume == "auto"
        _set_aside(folder, identity, re.compile("last") if continues else _OF_A_RUN, is_again)
    with atomic_write(folder / "config.json") as file:
        file.write(as_json(identity.as_json(), indent=1).encode())


def _set_aside(folder: Path, identity: Identity, names: re.Pattern[str], is_again: bool) -> None:
    """Move what earlier runs wrote under such names into a folder of its own. is_again: the same run was interrupted before it had saved
    anything; its reference scores stay."""
    moved = [path for path in folder.iterdir() if names.fullmatch(path.name) and not (is_again and _KEYED.fullmatch(path.name))]
    read = identity.paths
    for path in moved:
        if path.resolve() in read and not _START.fullmatch(path.name):
            refuse(f"{path}: this run starts from it and would overwrite it; name another --proj_dir")
    if any(path.resolve() in read for path in moved):
        moved = [path for path in moved if not _START.fullmatch(path.name)]
    if not moved:
        return
    earlier = next(path for n in range(1, 10**6) if not (path := folder / f"earlier-{n}").exists())
    earlier.mkdir()
    # The file that says that a run is finished goes first: a crash in between must not leave it next to the new run's files.
    for path in sorted(moved, key=lambda path: not path.name.endswith("-final.json")):
        path.rename(earlier / path.name)
    log.info("what an earlier run wrote is now in %s", earlier)


def saved_name(peft: str, label: str) -> str:
    """The name that a run with that --peft gives to the weights it saves: an epoch's by its number, the last ones by "final"."""
    return {"none": f"rwkv-{label}.pth", "state": f"state-{label}.pth"}.get(peft, f"adapter-{label}")


def save_end(path: Path, identity: Identity, step: int) -> None:
    """Record next to a run's last file, at `path`, which run it is the result of."""
    end = {**identity.as_json(), "step": step, "sha256": hash_of(path)}
    with atomic_write(path.with_suffix(".json")) as file:
        file.write(as_json(end, indent=1).encode())


def is_finished(path: Path, identity: Identity, total_steps: int) -> bool:
    """Whether `path` is the last file of this run: after this number of optimizer steps, or because the same --early_stop has ended it."""
    end = _read_json(path.with_suffix(".json"))
    if end is None or not path.exists() or end.pop("sha256", "") != hash_of(path):
        return False
    early_stop = end.get("early_stop", 0)
    is_end = end.pop("step", 0) == total_steps or (early_stop > 0 and early_stop == identity.flags["early_stop"])
    return is_end and not identity.changes_from(Identity.from_json(end), {Part.INCIDENTAL})


def log_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each log, which are on disk when this returns."""
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
    """Remove from the logs what was written by steps that will be repeated."""
    for path in (folder / name for name in LOGS):
        if path.exists() and path.stat().st_size > sizes.get(path.name, 0):
            os.truncate(path, sizes.get(path.name, 0))


def save_vocabulary(characters: str, path: Path) -> None:
    """Token id -> character of a character-level corpus, as RWKV-LM's scripts read it: JSON in UTF-16LE."""
    with atomic_write(path) as file:
        file.write(as_json(dict(enumerate(characters)), ensure_ascii=False).encode("utf-16le"))


def newest_epoch(folder: Path) -> int | None:
    """The largest N of the folder's rwkv-N.pth, -1 for rwkv-init.pth alone, None for neither."""
    numbers = [int(match[1]) for path in folder.glob("rwkv-*.pth") if (match := re.fullmatch(r"rwkv-(\d+)\.pth", path.name))]
    if numbers:
        return max(numbers)
    return -1 if (folder / "rwkv-init.pth").exists() else None


def read_identity(folder: Path) -> Identity | None:
    """The identity in a folder's config.json; None without one."""
    settings = _read_json(folder / "config.json")
    return None if settings is None else Identity.from_json(settings)


def _read_json(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"{path}: not readable as JSON ({error})")
    return settings if isinstance(settings, dict) else refuse(f"{path}: not a JSON object")
