"""What a run saves, when it gives up, and what it shows."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, NOT_NEGATIVE, SHARE, SWITCH, Part, flag

# Figures of held-out pairs that can decide which evaluation is the best.
OF_PAIRS = ("loss_dpo", "rewards/accuracies", "rewards/margins", "logps/accuracies")


@dataclass(frozen=True)
class SavingSettings:
    """Weights, and everything that a run needs to continue."""

    TITLE: ClassVar[str] = "saving"

    epoch_save: int = flag(5, "N: save rwkv-{epoch}.pth every N epochs; 0: only at the end", NOT_NEGATIVE)
    save_every: int = flag(
        0, "N: save everything that a run needs to continue into last/, every N optimizer steps; 0: after every epoch", NOT_NEGATIVE,
        part=Part.INCIDENTAL,
    )  # fmt: skip
    keep: int = flag(2, "how many of those checkpoints to keep", AT_LEAST_ONE, part=Part.INCIDENTAL)


@dataclass(frozen=True)
class HeldOutSettings:
    """When held-out data is evaluated and how much of it, how the figures are used, and which prompts the model answers then."""

    TITLE: ClassVar[str] = "held-out evaluation"

    eval_every: int = flag(
        0, "N: evaluate dpo_valid_file and valid_data_file before the first optimizer step and every N steps, in addition to the end of "
        "every epoch; 0: only at the end of every epoch", NOT_NEGATIVE, part=Part.INCIDENTAL,
    )  # fmt: skip
    eval_pairs: int = flag(0, "N: evaluate N pairs of dpo_valid_file, drawn by the seed; 0: all", NOT_NEGATIVE, part=Part.INCIDENTAL)
    eval_windows: int = flag(0, "N: evaluate the first N windows of valid_data_file; 0: all", NOT_NEGATIVE, part=Part.INCIDENTAL)
    keep_best: str = flag(
        "", "save the weights of the evaluation with the best value of this figure as rwkv-best.pth (adapter-best, state-best.pth)",
        choices=("", *OF_PAIRS, "corpus_loss"), part=Part.INCIDENTAL,
    )  # fmt: skip
    early_stop: int = flag(
        0, "N: end the run after N evaluations in a row without an improvement of --keep_best's figure (by default loss_dpo, or "
        "corpus_loss); 0: don't", NOT_NEGATIVE, part=Part.INCIDENTAL,
    )  # fmt: skip
    sample_prompts: str = flag(
        "", "file of prompts (one per line, or the field prompt of a .jsonl); answers are written to samples.jsonl before the first "
        "optimizer step and at every evaluation", names_file=True, part=Part.INCIDENTAL,
    )  # fmt: skip
    sample_tokens: int = flag(100, "maximum length of those answers, in tokens", AT_LEAST_ONE, part=Part.INCIDENTAL)
    sample_temperature: float = flag(
        0.0, "sampling temperature of those answers; 0: always the most likely token", NOT_NEGATIVE, part=Part.INCIDENTAL
    )
    sample_top_p: float = flag(
        1.0, "nucleus sampling of those answers: the most likely tokens with this total probability", SHARE, part=Part.INCIDENTAL
    )

    def watched(self, has_pairs: bool) -> str:
        """The figure that decides which evaluation is the best; has_pairs: held-out pairs are evaluated."""
        return self.keep_best or ("loss_dpo" if has_pairs else "corpus_loss")


@dataclass(frozen=True)
class TrainingSettings:
    """Bad steps and logging."""

    TITLE: ClassVar[str] = "bad steps and logging"

    max_bad_steps: int = flag(
        10, "N: stop after N optimizer steps in a row whose loss or gradient is not finite", AT_LEAST_ONE, part=Part.INCIDENTAL
    )
    wandb: str = flag("", "Weights & Biases project; empty: don't use it", part=Part.INCIDENTAL)
    tensorboard: int = flag(
        0, "1: write TensorBoard event files into tensorboard/ in proj_dir; needs its package", SWITCH, part=Part.INCIDENTAL
    )
    enable_progress_bar: bool = flag(True, "show progress: a bar in a terminal, lines elsewhere", part=Part.INCIDENTAL)
    log_every_s: float = flag(
        30.0, "seconds between those lines if the output is not a terminal; 0: one line per step", NOT_NEGATIVE, part=Part.INCIDENTAL
    )
