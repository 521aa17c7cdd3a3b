"""What a run trains."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, BELOW_ONE, SWITCH, Part, flag

# What means nothing without an adapter.
ADAPTER_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_layers", "train_extra")


@dataclass(frozen=True)
class TuningSettings:
    """Every weight, an adapter, or first states."""

    TITLE: ClassVar[str] = "tuning"

    peft: str = flag(
        "none", "what is trained: every weight; an adapter of few weights beside them; or the state that sequences begin from",
        choices=("none", "lora", "dora", "pissa", "rslora", "state"),
    )  # fmt: skip
    lora_r: int = flag(32, "rank of the adapter's matrices", AT_LEAST_ONE)
    lora_alpha: int = flag(64, "scale of the adapter: it adds alpha / r times its product (rslora: alpha / sqrt(r))", AT_LEAST_ONE)
    lora_dropout: float = flag(0.0, "dropout of the adapter's input", BELOW_ONE)
    lora_targets: str = flag(
        "receptance,key,value,gate,output", "projections with an adapter, of those the model has; att.key or ffn.key for one half alone"
    )
    lora_layers: str = flag("", "layers with an adapter, such as 0-11 or 0,5-7; empty: all")
    train_extra: str = flag(
        "", "weights trained in full beside the adapter: any of time, lowrank (part of time in RWKV-6 and 7), ln, emb, head"
    )  # fmt: skip
    quant: str = flag(
        "none", "the base's projections beside what --peft trains, through bitsandbytes: in 8 bits (int8) or 4 (nf4); none: in the compute "
        "dtype", choices=("none", "int8", "nf4"),
    )  # fmt: skip
    peft_load: str = flag(
        "", "adapter folder, or with --peft state a state file, to go on from", part=Part.CONTINUATION, names_file=True
    )
    any_base: int = flag(
        0, "1: take a peft_load that was trained on another base model than load_model", SWITCH, part=Part.INCIDENTAL
    )
