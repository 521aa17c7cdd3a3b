"""What a run saves, when it gives up, and what it shows."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, NOT_NEGATIVE, SHARE, SWITCH, Part, flag

# Figures of held-out pairs of which the best evaluation may be told.
OF_PAIRS = ("loss_dpo", "rewards/accuracies", "rewards/margins", "logps/accuracies")


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
    """When held-out data is evaluated and how much of it, what is made of the figures, and what the model is asked then."""

    TITLE: ClassVar[str] = "held-out evaluation"

    eval_every: int = flag(
        0, "evaluate dpo_valid_file and valid_data_file before the first optimizer step and after every so many, beside the end of every "
        "epoch; 0: at the ends of epochs alone", NOT_NEGATIVE, part=Part.INCIDENTAL,
    )  # fmt: skip
    eval_pairs: int = flag(0, "evaluate that many pairs of dpo_valid_file, drawn by the seed; 0: all", NOT_NEGATIVE, part=Part.INCIDENTAL)
    eval_windows: int = flag(0, "evaluate that many windows of valid_data_file, its first; 0: all", NOT_NEGATIVE, part=Part.INCIDENTAL)
    keep_best: str = flag(
        "", "save the weights with the best of these figures of all evaluations as rwkv-best.pth (adapter-best, state-best.pth)",
        choices=("", *OF_PAIRS, "corpus_loss"), part=Part.INCIDENTAL,
    )  # fmt: skip
    early_stop: int = flag(
        0, "end the run after so many evaluations in a row without a better figure of --keep_best (else of loss_dpo, or corpus_loss); 0: "
        "don't", NOT_NEGATIVE, part=Part.INCIDENTAL,
    )  # fmt: skip
    sample_prompts: str = flag(
        "", "write answers to the prompts of this file (a line each; of .jsonl the field prompt) into samples.jsonl before the first "
        "optimizer step and at every evaluation", names_file=True, part=Part.INCIDENTAL,
    )  # fmt: skip
    sample_tokens: int = flag(100, "longest of those answers, in tokens", AT_LEAST_ONE, part=Part.INCIDENTAL)
    sample_temperature: float = flag(0.0, "of those answers; 0: always the likeliest token", NOT_NEGATIVE, part=Part.INCIDENTAL)
    sample_top_p: float = flag(1.0, "of those answers: the likeliest tokens that make up so much", SHARE, part=Part.INCIDENTAL)

    def watched(self, has_pairs: bool) -> str:
        """The figure that says which evaluation is the best; has_pairs: held-out pairs are evaluated."""
        return self.keep_best or ("loss_dpo" if has_pairs else "corpus_loss")


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
