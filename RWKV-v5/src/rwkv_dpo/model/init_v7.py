"""Initial weights of RWKV-7's blocks, as RWKV-LM's RWKV-v7/train_temp makes them."""

import math

import torch
from torch import Tensor

from rwkv_dpo.model.initial import Place, orthogonal

# How fast the mix with the token before falls over the channels; of the channel mix it is to_last ** 4.
_FALLS = {"att.x_r": 0.2, "att.x_g": 0.2, "att.x_w": 0.9, "att.x_a": 0.9, "att.x_k": 0.7, "att.x_v": 0.7}
_CONSTANT = {"att.k_a": 1.02, "att.r_k": -0.04, "att.output.weight": 0.0, "ffn.value.weight": 0.0}
_GAINS = {"att.key.weight": 0.1}


def block_weight_7(name: str, parameter: Tensor, place: Place, generator: torch.Generator) -> Tensor:
    """Of a weight that is no norm's, by its name within the block."""
    if name in _FALLS:
        return 1 - place.ramp ** (_FALLS[name] * place.to_last)
    if name in _CONSTANT:
        return torch.full_like(parameter, _CONSTANT[name])
    match name:
        case "ffn.x_k":
            return 1 - place.ramp ** (place.to_last**4)
        case "att.w1" | "att.a1" | "att.v1" | "att.g1":
            return torch.zeros_like(parameter)
        case "att.w2" | "att.a2" | "att.v2" | "att.g2":
            return orthogonal(parameter, 0.1 * math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1])), generator)
        case "att.w0" | "att.a0" | "att.v0" | "att.k_k":
            return _of_channels(name, place)
        case _:
            return orthogonal(parameter, _GAINS.get(name, 1.0), generator)


def _of_channels(name: str, place: Place) -> Tensor:
    width, size = place.shape.dim_att, place.shape.head_size
    channel = torch.arange(width)
    along = channel / (width - 1)
    centred = (channel % size - (size - 1) / 2) / ((size - 1) / 2)
    zigzag = centred * centred.abs()
    match name:
        case "att.w0":
            return -6 + 6 * along ** (1 + place.depth**0.3) + 0.5 + 2.5 * zigzag
        case "att.a0":
            return -0.19 + 0.3 * zigzag + 0.4 * (along - 0.5)
        case "att.v0":
            return 0.73 - 0.4 * (along - 0.5)
        case _:  # att.k_k
            return 0.71 - 0.1 * (along - 0.5)
