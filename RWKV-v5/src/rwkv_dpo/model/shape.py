"""The sizes of an RWKV model, and the names and shapes of the weights that follow from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.model.settings import ModelSettings

# Which flag sets which number of a ModelShape.
SHAPE_FLAGS = {
    "n_layer": "n_layer", "n_embd": "n_embd", "dim_att": "dim_att", "dim_ffn": "dim_ffn", "vocab_size": "vocab_size",
    "head_size": "head_size_a",
}  # fmt: skip

_FLAGS = SHAPE_FLAGS | {"version": "my_testing"}


@dataclass(frozen=True)
class ModelShape:
    """dim_att, dim_ffn: widths of the time mix and the channel mix. head_size: of the WKV state, N x N numbers a head."""

    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    vocab_size: int
    head_size: int = 64
    # The group norm after WKV divides its input by this; RWKV-5 and the `rwkv` package use 8.
    head_size_divisor: int = 8
    # Of the version's low-rank parts, in the order of its Mixes.ranks; empty: as for a new model.
    ranks: tuple[int, ...] = ()
    version: str = "5"

    @property
    def n_head(self) -> int:
        """Heads of the time mix."""
        return self.dim_att // self.head_size


def shape_of_flags(settings: ModelSettings) -> ModelShape:
    """The shape that flags ask for."""
    s = settings
    dim_ffn = 4 * s.n_embd if s.version == "7" else int(s.n_embd * 3.5) // 32 * 32
    return ModelShape(
        n_layer=s.n_layer, n_embd=s.n_embd, dim_att=s.dim_att or s.n_embd, dim_ffn=s.dim_ffn or dim_ffn, vocab_size=s.vocab_size,
        head_size=s.head_size_a, head_size_divisor=s.head_size_divisor, version=s.version,
    )  # fmt: skip


def check_flags(shape: ModelShape, wanted: Mapping[str, int | str], path: str | Path) -> None:
    """Refuses numbers of `wanted` (by ModelShape field) that contradict the checkpoint, naming their flags."""
    wrong = [
        f"--{_FLAGS[field]} {value} (the file has {getattr(shape, field)})"
        for field, value in wanted.items()
        if value != getattr(shape, field)
    ]
    if wrong:
        refuse(f"{path}: contradicts {', '.join(wrong)}")
