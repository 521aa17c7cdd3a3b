"""What a run saves, when it gives up, and what it shows."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, NOT_NEGATIVE, Part, flag


@dataclass(frozen=True)
class SavingSettings:
    """Weights, and all that a run needs to go on."""

    TITLE: ClassVar[str] = "saving"

    epoch_save: int = flag(5, "save rwkv-{epoch}.pth every so many epochs; 0: only at the end", NOT_NEGATIVE)
    save_every: int = flag(
        0, "save all that a run needs to go on, into last/, every so many optimizer steps; 0: after every epoch", NOT_NEGATIVE,
        part=Part.INCIDENTAL,
    )  # fmt: skip
    keep: int = flag(2, "how many of those checkpoints stay", AT_LEAST_ONE, part=Part.INCIDENTAL)


@dataclass(frozen=True)
class TrainingSettings:
    """Bad steps and logging."""

    TITLE: ClassVar[str] = "bad steps and logging"

    max_bad_steps: int = flag(
        10, "stop after so many optimizer steps in a row whose loss or gradient is not finite", AT_LEAST_ONE, part=Part.INCIDENTAL
    )
    wandb: str = flag("", "Weights & Biases project; empty: don't use it", part=Part.INCIDENTAL)
    enable_progress_bar: bool = flag(True, "show a progress bar", part=Part.INCIDENTAL)
