"""How weights move, and how long."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, SWITCH, Part, flag


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate."""

    TITLE: ClassVar[str] = "optimizer"

    lr_init: float = flag(6e-4, "learning rate after warm-up", NOT_NEGATIVE)
    lr_final: float = flag(1e-5, "learning rate at the last step", NOT_NEGATIVE)
    warmup_steps: int = flag(-1, "optimizer steps of warm-up, from a fifth of the rate; -1: none", part=Part.CONTINUATION)
    beta1: float = flag(0.9, "Adam", BELOW_ONE)
    beta2: float = flag(0.99, "Adam", BELOW_ONE)
    adam_eps: float = flag(1e-8, "Adam", NOT_NEGATIVE)
    optim: str = flag(
        "adamw", "AdamW's moments, by bytes a trainable parameter: adamw fp32, 8; adamw_bf16state bf16 rounded stochastically, 4; "
        "adamw8bit 8-bit by bitsandbytes, 2", choices=("adamw", "adamw8bit", "adamw_bf16state"),
    )  # fmt: skip
    weight_decay: float = flag(0.0, "decay of the matrices, decoupled (AdamW)", NOT_NEGATIVE)
    weight_decay_final: float = flag(-1.0, "weight decay at the last step; -1: constant")
    layerwise_lr: int = flag(1, "1: time_decay, in RWKV-7 w0, learns twice as fast; 0: one rate for all", SWITCH)


@dataclass(frozen=True)
class EpochSettings:
    """How many steps a run has."""

    TITLE: ClassVar[str] = "length of the run"

    epoch_steps: int = flag(
        1000, "micro-batches on each device in an epoch; a multiple of accumulate_grad_batches", AT_LEAST_ONE, part=Part.LAYOUT
    )
    epoch_count: int = flag(500, "epochs to train", AT_LEAST_ONE, part=Part.CONTINUATION)
    epochs: int = flag(
        0, "instead of epoch_steps and epoch_count: passes over the pairs, or, without pairs, over the corpus; 0: those two count",
        NOT_NEGATIVE, part=Part.INCIDENTAL,
    )  # fmt: skip
    epoch_begin: int = flag(
        0, "number of the first epoch, when continuing from a checkpoint", NOT_NEGATIVE, part=Part.CONTINUATION
    )
    accumulate_grad_batches: int = flag(1, "micro-batches in an optimizer step", AT_LEAST_ONE, part=Part.LAYOUT)
    my_pile_edecay: int = flag(0, "epochs at lr_init before the decay begins", NOT_NEGATIVE)
    my_exit: int = flag(99999999, "stop after the epoch of this number", part=Part.CONTINUATION)
    my_exit_tokens: int = flag(
        0, "stop after this many corpus tokens, with a cosine schedule (negative: cosine and exponential averaged)"
    )
