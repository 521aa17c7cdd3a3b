"""When a run gives up, and what it shows."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, Part, flag


@dataclass(frozen=True)
class TrainingSettings:
    """Bad steps and logging."""

    TITLE: ClassVar[str] = "bad steps and logging"

    max_bad_steps: int = flag(
        10, "stop after so many optimizer steps in a row whose loss or gradient is not finite", AT_LEAST_ONE, part=Part.INCIDENTAL
    )
    wandb: str = flag("", "Weights & Biases project; empty: don't use it", part=Part.INCIDENTAL)
    enable_progress_bar: bool = flag(True, "show a progress bar", part=Part.INCIDENTAL)
