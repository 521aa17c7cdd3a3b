"""How the optimizer updates weights, and for how long."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, SWITCH, Part, flag


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its learning rate."""

    TITLE: ClassVar[str] = "optimizer"

    lr_init: float = flag(6e-4, "learning rate after warm-up", NOT_NEGATIVE)
    lr_final: float = flag(1e-5, "learning rate at the last step", NOT_NEGATIVE)
    warmup_steps: int = flag(-1, "optimizer steps of warm-up, starting at a fifth of the rate; -1: none", part=Part.CONTINUATION)
    beta1: float = flag(0.9, "Adam's beta 1", BELOW_ONE)
    beta2: float = flag(0.99, "Adam's beta 2", BELOW_ONE)
    adam_eps: float = flag(1e-8, "Adam's epsilon", NOT_NEGATIVE)
    optim: str = flag(
        "adamw", "AdamW with moments in fp32 (adamw; 8 bytes per trainable parameter), in bf16 with stochastic rounding "
        "(adamw_bf16state; 4), or in 8 bits through bitsandbytes (adamw8bit; 2)", choices=("adamw", "adamw8bit", "adamw_bf16state"),
    )  # fmt: skip
    weight_decay: float = flag(0.0, "decoupled weight decay of the matrices (AdamW)", NOT_NEGATIVE)
    weight_decay_final: float = flag(-1.0, "weight decay at the last step; -1: constant")
    layerwise_lr: int = flag(1, "1: time_decay (w0 in RWKV-7) has twice the learning rate; 0: one rate for all", SWITCH)


@dataclass(frozen=True)
class EpochSettings:
    """How many steps a run has."""

    TITLE: ClassVar[str] = "length of the run"

    epoch_steps: int = flag(
        1000, "micro-batches per epoch and device; a multiple of accumulate_grad_batches", AT_LEAST_ONE, part=Part.LAYOUT
    )
    epoch_count: int = flag(500, "epochs to train", AT_LEAST_ONE, part=Part.CONTINUATION)
    epochs: int = flag(
        0, "passes over the pairs, or over the corpus if there are no pairs; replaces epoch_steps and epoch_count; 0: use those",
        NOT_NEGATIVE, part=Part.INCIDENTAL,
    )  # fmt: skip
    epoch_begin: int = flag(
        0, "number of the first epoch, when continuing from a checkpoint", NOT_NEGATIVE, part=Part.CONTINUATION
    )
    accumulate_grad_batches: int = flag(1, "micro-batches per optimizer step", AT_LEAST_ONE, part=Part.LAYOUT)
    my_pile_edecay: int = flag(0, "epochs at lr_init before the decay begins", NOT_NEGATIVE)
    my_exit: int = flag(99999999, "stop after the epoch with this number", part=Part.CONTINUATION)
    my_exit_tokens: int = flag(
        0, "stop after this many corpus tokens, with a cosine schedule (negative: the average of cosine and exponential)"
    )
