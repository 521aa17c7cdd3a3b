"""The settings of a run: those of all rooms combined. Only this folder sees the whole."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar

from rwkv_dpo.batches.settings import BatchSettings
from rwkv_dpo.data.settings import DataSettings
from rwkv_dpo.devices.settings import DeviceSettings
from rwkv_dpo.model.settings import ModelSettings
from rwkv_dpo.objective.settings import ObjectiveSettings
from rwkv_dpo.optimizer.length import RunLength, run_length, schedule_of
from rwkv_dpo.optimizer.schedule import Schedule
from rwkv_dpo.optimizer.settings import EpochSettings, OptimizerSettings
from rwkv_dpo.run_folder.settings import FolderSettings
from rwkv_dpo.settings.fields import SWITCH, Accepts, Flag, Part, check_values, flag, flags_of
from rwkv_dpo.training.settings import HeldOutSettings, SavingSettings, TrainingSettings
from rwkv_dpo.tuning.settings import TuningSettings

_STAGES = Accepts(lambda stage: stage in (0, 1, 2, 3), "0, 1, 2 and 3 are accepted")


@dataclass(frozen=True)
class GeneralSettings:
    """Settings that concern the run as a whole."""

    TITLE: ClassVar[str] = "the run"

    dry_run: int = flag(
        0, "1: don't train; print the parameters, the estimated peak memory by part, and what each memory flag would save", SWITCH
    )
    recipe: str = flag(
        "", "settings for a first run on a small model: dpo, lora or state for preferences, pretrain for a corpus; flags that are given "
        "take precedence", choices=("", "dpo", "lora", "state", "pretrain"), part=Part.INCIDENTAL,
    )  # fmt: skip
    random_seed: int = flag(-1, "seed of initial weights, sampling and dropout; -1: 0")
    my_pile_stage: int = flag(
        0, "RWKV-LM's staged pre-training: 1 makes initial weights, 2 and 3 continue from the newest checkpoint", _STAGES,
        part=Part.CONTINUATION,
    )  # fmt: skip

    @property
    def seed(self) -> int:
        """The seed of all generators."""
        return max(self.random_seed, 0)

    @property
    def is_staged(self) -> bool:
        """Whether the run continues staged pre-training."""
        return self.my_pile_stage >= 2


@dataclass(frozen=True)
class RunSettings:
    """Every flag once, in the room that reads it. The order of rooms is that of --help, docs/flags.md and config.json."""

    general: GeneralSettings = field(default_factory=GeneralSettings)
    folder: FolderSettings = field(default_factory=FolderSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    tuning: TuningSettings = field(default_factory=TuningSettings)
    data: DataSettings = field(default_factory=DataSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    batches: BatchSettings = field(default_factory=BatchSettings)
    epochs: EpochSettings = field(default_factory=EpochSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    devices: DeviceSettings = field(default_factory=DeviceSettings)
    saving: SavingSettings = field(default_factory=SavingSettings)
    held_out: HeldOutSettings = field(default_factory=HeldOutSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def with_flags(self, **values: Any) -> "RunSettings":
        """These settings with some flags changed, each by its own name."""
        changed = {}
        for name, room in ROOMS.items():
            own = {flag: values.pop(flag) for flag in flags_of(room) if flag in values}
            if own:
                changed[name] = replace(getattr(self, name), **own)
        assert not values, f"no such flags: {', '.join(values)}"
        return replace(self, **changed)

    def as_flags(self) -> dict[str, Any]:
        """The values of all flags by name, as config.json has them."""
        return {flag: getattr(getattr(self, name), flag) for name, room in ROOMS.items() for flag in flags_of(room)}

    def check_values(self) -> None:
        """Refuse a value that its flag doesn't accept. Raises InputError."""
        for name in ROOMS:
            check_values(getattr(self, name))

    @cached_property
    def length(self) -> RunLength:
        """The length of the run, which several rooms determine."""
        samples = self.batches.micro_bsz * self.devices.world_size
        return run_length(self.epochs, samples, self.data.ctx_len, self.general.is_staged)

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule of learning rate and weight decay."""
        return schedule_of(self.optimizer, self.epochs, self.length)

    @property
    def continues(self) -> bool:
        """Whether the run continues the epochs of an earlier one, from its weights."""
        return self.epochs.epoch_begin > 0 or self.general.is_staged


ROOMS: Mapping[str, type] = {f.name: f.default_factory for f in fields(RunSettings)}  # type: ignore[misc]
FLAGS: Mapping[str, Flag] = {name: flag for room in ROOMS.values() for name, flag in flags_of(room).items()}
PARTS: Mapping[str, Part] = {name: flag.part for name, flag in FLAGS.items()}


def settings_of(values: Mapping[str, Any]) -> RunSettings:
    """The settings for the given flags; the others keep their defaults."""
    return RunSettings().with_flags(**values)
