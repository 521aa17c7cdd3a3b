"""The sizes of an RWKV model, and the names and shapes of the weights that follow from them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    n_layer: int
    n_embd: int
    dim_att: int
    dim_ffn: int
    vocab_size: int
    head_size: int = 64
    # The group norm after WKV divides its input by this; RWKV-5 and the `rwkv` package use 8.
    head_size_divisor: int = 8

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size
