"""Which model a run trains, and how its blocks are computed."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, BELOW_ONE, NOT_NEGATIVE, SWITCH, Accepts, Part, flag

_HEAD_SIZES = Accepts(lambda n: n % 8 == 0 and n <= 128, "multiples of 8 up to 128 are accepted")
# Model versions as RWKV-LM spells them. A checkpoint's file determines its own; a new model is an RWKV-5 by default.
VERSIONS = {"": "5", "r3r4": "5", "x052": "5", "x060": "6", "x070": "7"}
_VERSIONS = Accepts(
    lambda name: name in VERSIONS or not name.startswith("x0"),
    "that model version isn't supported; accepted are '' (the file's, else RWKV-5), r3r4 and x052 (RWKV-5), x060, x070",
)


@dataclass(frozen=True)
class ModelSettings:
    """The checkpoint to start from, or the shape of a new model."""

    TITLE: ClassVar[str] = "model"

    load_model: str = flag(
        "", "checkpoint (.pth, or hf:OWNER/NAME/FILE on the Hub) to start from; empty: make initial weights and save them as rwkv-init.pth",
        part=Part.CONTINUATION, names_file=True,
    )  # fmt: skip
    load_partial: int = flag(0, "1: weights missing in the checkpoint keep their initial values", SWITCH)
    my_testing: str = flag(
        "", "model version as RWKV-LM spells it; empty: the checkpoint's, else RWKV-5", _VERSIONS, choices=tuple(VERSIONS)
    )  # fmt: skip
    n_layer: int = flag(6, "number of layers (taken from the checkpoint if one is loaded)", AT_LEAST_ONE)
    n_embd: int = flag(512, "width of the model (taken from the checkpoint if one is loaded)", AT_LEAST_ONE)
    dim_att: int = flag(0, "width of the time mix; 0: n_embd", NOT_NEGATIVE)
    dim_ffn: int = flag(
        0, "width of the channel mix; 0: 3.5 * n_embd rounded down to a multiple of 32, or 4 * n_embd for RWKV-7", NOT_NEGATIVE
    )  # fmt: skip
    vocab_size: int = flag(
        0, "size of the vocabulary; 0: that of the checkpoint, else the characters of the text; 65536: the World vocabulary, with its "
        "tokenizer for text", NOT_NEGATIVE,
    )  # fmt: skip
    head_size_a: int = flag(64, "head size, a multiple of 8 up to 128", AT_LEAST_ONE, _HEAD_SIZES)
    head_size_divisor: int = flag(8, "divisor of the group norm's input", AT_LEAST_ONE)
    dropout: float = flag(0.0, "dropout after each half of a block", BELOW_ONE)
    grad_cp: str = flag(
        "0", "1: recompute each block in the backward pass (least memory, a third more time); 0 and selective: recompute norms, mixes and "
        "gates only", choices=("0", "1", "selective"), part=Part.LAYOUT,
    )  # fmt: skip

    @property
    def version(self) -> str:
        """The version of the model that the flags ask for: "5", "6" or "7"."""
        return VERSIONS[self.my_testing]
