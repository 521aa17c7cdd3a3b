"""The checkpoints of `last/`, from which a run continues as if it had never stopped: their format, and which one to take."""

import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.files.hashed import fault_of, hashed_write, remove_hashed
from rwkv_dpo.files.torch_files import check_stored, load_torch
from rwkv_dpo.optimizer.length import RunLength
from rwkv_dpo.run_folder.contents import read_identity
from rwkv_dpo.run_folder.identity import Identity
from rwkv_dpo.run_folder.settings import FolderSettings
from rwkv_dpo.settings.fields import Part

log = logging.getLogger(__name__)
_FORM = 2


@dataclass(frozen=True)
class Progress:
    """The progress of a run. None of it depends on the number of processes or the strategy.

    identity: the run's, as JSON. step: optimizer steps done. samples: taken of the global sequence. logs: bytes of each log file that
    belong to those steps.
    """

    identity: dict[str, Any]
    step: int
    samples: int
    pairs_seen: int
    epoch_losses: list[float]
    skipped_steps: int
    bad_in_a_row: int
    logs: dict[str, int]


@dataclass(frozen=True)
class Saved:
    """A checkpoint of `last/`: trainable weights and the optimizer's state by parameter name, unsharded; generators by rank; for a moving
    reference, its state."""

    path: Path
    progress: Progress
    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]
    generators: list[dict[str, Tensor]]
    scaler: dict[str, Any]
    reference: dict[str, Any] = field(default_factory=dict)


def last_of(folder: Path) -> Path:
    """Where a run folder keeps the checkpoints that its run continues from."""
    return folder / "last"


def checkpoints_in(folder: Path) -> list[Path]:
    """Newest first."""
    steps = {int(m[1]): path for path in folder.glob("step-*.pth") if (m := re.fullmatch(r"step-(\d+)\.pth", path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def save(folder: Path, progress: Progress, parts: dict[str, Any], keep: int) -> Path:
    """Writes folder/step-N.pth. Once it is on disk, older ones are removed until `keep` are left, and so are those of later steps, which a
    run that was resumed from an earlier checkpoint repeats. Raises InputError.

    parts: the other fields of Saved.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: can't be created ({error.strerror})") from error
    path = folder / f"step-{progress.step}.pth"
    with hashed_write(path) as file:
        torch.save({"form": _FORM, "progress": asdict(progress), **parts}, file)  # type: ignore[arg-type]  # it only writes
    there = checkpoints_in(folder)
    newest = there.index(path)
    for other in there[:newest] + there[newest + keep :]:
        remove_hashed(other)
    return path


def load(path: Path) -> Saved:
    """Tensors are mapped from the file. InputError for anything that is not such a checkpoint, would execute code, or claims more than it
    holds."""
    loaded = load_torch(path)
    try:
        if loaded["form"] != _FORM:
            refuse(
                f"{path}: a checkpoint of format {loaded['form']}, of another version; {_FORM} is accepted. --resume none starts a "
                "fresh run"
            )
        # Earlier versions wrote no reference.
        parts = {f.name: loaded[f.name] for f in fields(Saved) if f.name not in ("path", "progress", "reference")}
        parts["reference"] = loaded.get("reference", {})
        saved = Saved(path, Progress(**loaded["progress"]), **parts)
        states = [value for state in saved.optimizer.values() for value in state.values()]
        generators = [value for rank in saved.generators for value in rank.values()]
        reference = [saved.reference["ref_logps"], *saved.reference["weights"].values()] if saved.reference else []
        check_stored((value for value in (*saved.weights.values(), *states, *generators, *reference) if isinstance(value, Tensor)), path)
        return saved
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a checkpoint to resume from ({error or type(error).__name__})") from error


def check_fits(saved: Saved, trained: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint that doesn't match the parameters that a run trains, by name: weights and optimizer states, shape by shape."""
    shapes = {name: tuple(parameter.shape) for name, parameter in trained.items()}
    found = {name: tuple(value.shape) for name, value in saved.weights.items() if isinstance(value, Tensor)}
    if found != shapes:
        odd = next(name for name in sorted(shapes.keys() | found.keys()) if shapes.get(name) != found.get(name))
        refuse(f"{saved.path}: {odd} is {found.get(odd, 'missing')}; this run trains {shapes.get(odd, 'no such weight')}")
    for name, state in saved.optimizer.items():
        # bitsandbytes keeps tables and one scale per block, smaller than the parameter; everything else has its shape.
        is_packed = saved.progress.identity["optim"] == "adamw8bit"
        for key, value in state.items():
            if isinstance(value, Tensor) and (name not in shapes or (not is_packed and tuple(value.shape) != shapes[name])):
                weight = shapes.get(name, "missing")
                refuse(f"{saved.path}: the optimizer's {key} of {name} is {tuple(value.shape)}; the weight is {weight}")


def choose(settings: FolderSettings, identity: Identity, length: RunLength, continues: bool) -> Path | None:
    """The checkpoint that --resume means, None for a fresh run. Refuses one that is damaged, or of another run. continues: this run
    continues the epochs of an earlier one, and may leave behind what remains of it."""
    if settings.resume == "none":
        return None
    if settings.resume != "auto":
        path = Path(settings.resume)
        if path.is_dir():
            path = next(iter(checkpoints_in(path)), path)
        if not path.is_file():
            refuse(f"--resume {settings.resume}: no such checkpoint; auto, none, or a step-N.pth are accepted")
        if fault := fault_of(path):
            refuse(f"--resume {path}: {fault}")
        _check(load(path), settings, identity, length)
        return path
    paths = checkpoints_in(last_of(settings.path))
    if not paths or _is_other_run(settings, identity, continues):
        return None
    for path in paths:
        fault = fault_of(path)
        if not fault:
            _check(load(path), settings, identity, length)
            return path
        log.warning("%s %s; the previous one is used", path, fault)
    refuse(
        f"{last_of(settings.path)}: all of its checkpoints are damaged ({paths[0].name} {fault_of(paths[0])}); --resume none starts a "
        "fresh run"
    )


def goes_on_here(settings: FolderSettings, path: Path | None) -> bool:
    """Whether a checkpoint to continue from is in the run folder's own last/."""
    return path is not None and path.resolve().parent == last_of(settings.path).resolve()


def start_of(saved: Saved | None) -> str:
    """The adapter that the run of a checkpoint began with, saved next to it; "" without one."""
    if saved is None or saved.progress.identity["peft"] in ("none", "state"):
        return ""
    return str(saved.path.parent.parent / "adapter-init")


def _is_other_run(settings: FolderSettings, identity: Identity, continues: bool) -> bool:
    """Whether the folder holds an interrupted run that this one is allowed to leave behind."""
    before = read_identity(settings.path)
    if before is None or not identity.changes_from(before, {Part.INCIDENTAL, Part.LAYOUT}):
        return False
    return bool(settings.overwrite) or (continues and not identity.changes_from(before, {Part.INCIDENTAL, Part.CONTINUATION}))


def _check(saved: Saved, settings: FolderSettings, identity: Identity, length: RunLength) -> None:
    before = Identity.from_json(saved.progress.identity)
    changed = identity.changes_from(before, {Part.INCIDENTAL, Part.LAYOUT})
    if changed and not settings.overwrite:
        refuse(f"{saved.path} is of a run with other settings: {', '.join(changed[:5])}; --resume none starts a fresh run")
    steps = before.flags["epoch_steps"] // before.flags["accumulate_grad_batches"]
    if steps != length.steps_per_epoch:
        refuse(
            f"--epoch_steps {length.epoch_steps}: {saved.path} counts {steps} optimizer steps per epoch; "
            f"{steps * length.accumulated} is accepted"
        )
    if saved.progress.step >= length.total_steps:
        refuse(f"{saved.path} has done {saved.progress.step} steps; with these settings the run ends at {length.total_steps}")
