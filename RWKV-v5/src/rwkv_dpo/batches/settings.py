"""How samples become micro-batches."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, NOT_NEGATIVE, SWITCH, Accepts, Part, flag


@dataclass(frozen=True)
class BatchSettings:
    """Size, order and chunks of micro-batches."""

    TITLE: ClassVar[str] = "batches"

    micro_bsz: int = flag(12, "corpus windows, and pairs, in a micro-batch on each device", AT_LEAST_ONE, part=Part.LAYOUT)
    batch_tokens: int = flag(
        0, "fill model calls with up to N tokens of an optimizer step's samples, over all devices, instead of with micro_bsz samples; the "
        "step stays the same; 0: off", NOT_NEGATIVE, part=Part.LAYOUT,
    )  # fmt: skip
    balance: str = flag(
        "tokens", "deal pairs so that all devices have equally many tokens, by taking pairs of like length together; "
        "none: in seeded random order", choices=("none", "tokens"),
    )  # fmt: skip
    chunk_ctx: int = flag(
        0, "N of at least 16: run windows and pairs in chunks of N tokens with the same gradient, rounding aside, in the memory of one "
        "chunk and a state at each border, for one more forward pass; 0: whole",
        Accepts(lambda n: n == 0 or n >= 16, "0 (off), and 16 or more tokens are accepted"), part=Part.LAYOUT,
    )  # fmt: skip
    tbptt: int = flag(
        0, "1: with --chunk_ctx, states carry no gradients from chunk to chunk: an approximation that spares windows the additional "
        "pass, and stores nothing at borders", SWITCH,
    )  # fmt: skip
    magic_prime: int = flag(0, "visit the corpus windows in RWKV-LM's magic_prime order; 0: seeded random order", NOT_NEGATIVE)
    my_pile_shift: int = flag(
        -1, "tokens by which magic_prime windows are shifted; -1: 0",
        Accepts(lambda n: n >= -1, "-1 (none), and 0 or more tokens are accepted"),
    )  # fmt: skip
