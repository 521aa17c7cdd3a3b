"""What initial weights of all versions share."""

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_dpo.model.shape import ModelShape


class Place(NamedTuple):
    """Where in the model a layer is."""

    shape: ModelShape
    layer: int
    depth: float  # 0 at the first layer, 1 at the last
    to_last: float  # 1 at the first layer, 1 / n_layer at the last
    ramp: Tensor  # of n_embd numbers, from 0 to just below 1

    @classmethod
    def of(cls, shape: ModelShape, layer: int) -> "Place":
        """The place of a layer, by its number."""
        ramp = torch.arange(shape.n_embd) / shape.n_embd
        return cls(shape, layer, layer / max(shape.n_layer - 1, 1), 1 - layer / shape.n_layer, ramp)


def norm_weight(name: str, parameter: Tensor, place: Place) -> Tensor | None:
    """Of a norm's weight or bias, by its name within the block; None for other weights."""
    if name == "att.ln_x.weight":
        return torch.full_like(parameter, ((1 + place.layer) / place.shape.n_layer) ** 0.7)
    if ".ln" in f".{name}":
        return torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter)
    return None


def orthogonal(parameter: Tensor, gain: float, generator: torch.Generator) -> Tensor:
    """A matrix of that shape, orthogonal but for the gain."""
    return torch.nn.init.orthogonal_(torch.empty(parameter.shape), gain=gain, generator=generator)
