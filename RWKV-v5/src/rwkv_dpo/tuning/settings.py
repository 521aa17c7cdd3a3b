"""What a run trains."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, BELOW_ONE, SWITCH, Part, flag

# Flags that have no meaning without an adapter.
ADAPTER_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_layers", "train_extra")


@dataclass(frozen=True)
class TuningSettings:
    """All weights, an adapter, or initial states."""

    TITLE: ClassVar[str] = "tuning"

    peft: str = flag(
        "none", "what is trained: all weights (none); an adapter, with the weights frozen; or the state that sequences start from (state)",
        choices=("none", "lora", "dora", "pissa", "rslora", "state"),
    )  # fmt: skip
    lora_r: int = flag(32, "rank of the adapter's matrices", AT_LEAST_ONE)
    lora_alpha: int = flag(64, "scale of the adapter: its product is multiplied by alpha / r (rslora: alpha / sqrt(r))", AT_LEAST_ONE)
    lora_dropout: float = flag(0.0, "dropout on the adapter's input", BELOW_ONE)
    lora_targets: str = flag(
        "receptance,key,value,gate,output",
        "projections that get an adapter, if the model has them; att.key or ffn.key for one half of the block",
    )
    lora_layers: str = flag("", "layers that get an adapter, such as 0-11 or 0,5-7; empty: all")
    train_extra: str = flag(
        "", "weights trained in full in addition to the adapter: any of time, lowrank (part of time in RWKV-6 and 7), ln, emb, head"
    )  # fmt: skip
    quant: str = flag(
        "none", "format of the frozen projections, with --peft: 8 bits (int8) or 4 bits (nf4), through bitsandbytes; none: the compute "
        "dtype", choices=("none", "int8", "nf4"),
    )  # fmt: skip
    peft_load: str = flag(
        "", "adapter folder to continue from, or with --peft state a state file", part=Part.CONTINUATION, names_file=True
    )
    any_base: int = flag(
        0, "1: accept a peft_load that was trained on another base model than load_model", SWITCH, part=Part.INCIDENTAL
    )
