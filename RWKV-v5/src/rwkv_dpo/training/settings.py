"""What a run saves, when it gives up, and what it shows."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, NOT_NEGATIVE, SWITCH, Part, flag


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
class HeldOutSettings:
    """When the pairs of dpo_valid_file are evaluated, and how many."""

    TITLE: ClassVar[str] = "held-out evaluation"

    eval_every: int = flag(
        0, "evaluate the pairs of dpo_valid_file before the first optimizer step and after every so many, beside the end of every epoch; "
        "0: at the ends of epochs alone", NOT_NEGATIVE, part=Part.INCIDENTAL,
    )  # fmt: skip
    eval_pairs: int = flag(0, "evaluate that many of them, drawn by the seed; 0: all", NOT_NEGATIVE, part=Part.INCIDENTAL)
    keep_best: str = flag(
        "", "save the weights with the best of these figures of all evaluations as rwkv-best.pth (adapter-best, state-best.pth)",
        choices=("", "loss_dpo", "rewards/accuracies", "rewards/margins", "logps/accuracies"), part=Part.INCIDENTAL,
    )  # fmt: skip


@dataclass(frozen=True)
class TrainingSettings:
    """Bad steps and logging."""

    TITLE: ClassVar[str] = "bad steps and logging"

    max_bad_steps: int = flag(
        10, "stop after so many optimizer steps in a row whose loss or gradient is not finite", AT_LEAST_ONE, part=Part.INCIDENTAL
    )
    wandb: str = flag("", "Weights & Biases project; empty: don't use it", part=Part.INCIDENTAL)
    tensorboard: int = flag(
        0, "1: write event files of TensorBoard, into tensorboard/ in proj_dir; needs its package", SWITCH, part=Part.INCIDENTAL
    )
    enable_progress_bar: bool = flag(True, "show how far the run is: a bar in a terminal, elsewhere lines", part=Part.INCIDENTAL)
    log_every_s: float = flag(
        30.0, "seconds between those lines, where output is no terminal; 0: a line for every step", NOT_NEGATIVE, part=Part.INCIDENTAL
    )
