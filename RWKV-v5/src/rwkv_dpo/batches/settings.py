"""How samples become micro-batches."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, NOT_NEGATIVE, SWITCH, Accepts, Part, flag


@dataclass(frozen=True)
class BatchSettings:
    """Size, order and chunks of micro-batches."""

    TITLE: ClassVar[str] = "batches"

    micro_bsz: int = flag(12, "corpus windows, and pairs, per micro-batch and device", AT_LEAST_ONE, part=Part.LAYOUT)
    batch_tokens: int = flag(
        0, "N: pack the samples of an optimizer step, over all devices, into model calls of up to N tokens, instead of micro_bsz samples "
        "per call; the step stays the same; 0: off", NOT_NEGATIVE, part=Part.LAYOUT,
    )  # fmt: skip
    balance: str = flag(
        "tokens", "tokens: batch pairs of similar length, so that all devices have about the same number of tokens; "
        "none: seeded random order", choices=("none", "tokens"),
    )  # fmt: skip
    chunk_ctx: int = flag(
        0, "N of at least 16: run windows and pairs in chunks of N tokens, with the memory of one chunk and a state at each boundary, for "
        "one more forward pass; the gradient is the same up to rounding; 0: off",
        Accepts(lambda n: n == 0 or n >= 16, "0 (off), and 16 or more tokens are accepted"), part=Part.LAYOUT,
    )  # fmt: skip
    tbptt: int = flag(
        0, "1: with --chunk_ctx, states carry no gradients between chunks: an approximation that saves windows the additional "
        "pass and stores no states", SWITCH,
    )  # fmt: skip
    magic_prime: int = flag(0, "visit the corpus windows in RWKV-LM's magic_prime order; 0: seeded random order", NOT_NEGATIVE)
    my_pile_shift: int = flag(
        -1, "tokens by which magic_prime windows are shifted; -1: 0",
        Accepts(lambda n: n >= -1, "-1 (none), and 0 or more tokens are accepted"),
    )  # fmt: skip
