"""Initial weights as RWKV-LM makes them.

Token mixes and decays follow the layer's depth; what writes into the residual stream, and the channel mix's gate, start at
zero; the embedding is tiny (ln0 scales it up); everything else is orthogonal.
"""

import math

import torch
from torch import Tensor

from rwkv_dpo.model.init_v7 import block_weight_7
from rwkv_dpo.model.initial import Place, norm_weight, orthogonal
from rwkv_dpo.model.rwkv import RWKV

_ZERO = ("att.output.weight", "ffn.value.weight", "ffn.receptance.weight")


@torch.no_grad()
def init_weights(model: RWKV, lr_init: float, seed: int) -> None:
    """Fills every weight of a model. lr_init sets the range of RWKV-5's embedding, as in RWKV-LM."""
    generator = torch.Generator().manual_seed(seed)
    block_weight = {"5": _block_weight_5, "6": _block_weight_6, "7": block_weight_7}[model.shape.version]
    emb_range = lr_init if model.shape.version == "5" else 1e-4
    for name, parameter in model.named_parameters():
        if name.startswith("blocks."):
            layer, rest = name.removeprefix("blocks.").split(".", 1)
            place = Place.of(model.shape, int(layer))
            value = norm_weight(rest, parameter, place)
            value = block_weight(rest, parameter, place, generator) if value is None else value
        elif name == "emb.weight":
            value = torch.empty_like(parameter, device="cpu").uniform_(-emb_range, emb_range, generator=generator)
        elif name == "head.weight":
            gain = 0.5 * math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1]))
            value = orthogonal(parameter, gain, generator)
        else:  # ln_out
            value = torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter)
        parameter.copy_(value.view(parameter.shape))


def _block_weight_5(name: str, parameter: Tensor, place: Place, generator: torch.Generator) -> Tensor:
    ramp, to_last = place.ramp, place.to_last
    match name:
        case "att.time_decay" | "att.time_faaaa":
            return _decay_or_bonus(name, place)
        case "att.time_mix_k" | "ffn.time_mix_k" | "ffn.time_mix_r":
            return ramp**to_last
        case "att.time_mix_v":
            return ramp**to_last + 0.3 * place.depth
        case "att.time_mix_r" | "att.time_mix_g":
            return ramp ** (0.5 * to_last)
        case _ if name in _ZERO:
            return torch.zeros_like(parameter)
        case _:
            return orthogonal(parameter, math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1])), generator)


def _block_weight_6(name: str, parameter: Tensor, place: Place, generator: torch.Generator) -> Tensor:
    ramp, to_last = place.ramp, place.to_last
    match name:
        case "att.time_decay" | "att.time_faaaa":
            return _decay_or_bonus(name, place)
        case "att.time_maa_x" | "att.time_maa_w" | "att.time_maa_k":
            return 1 - ramp**to_last
        case "att.time_maa_v":
            return 1 - (ramp**to_last + 0.3 * place.depth)
        case "att.time_maa_r" | "att.time_maa_g":
            return 1 - ramp ** (0.5 * to_last)
        case "ffn.time_maa_k" | "ffn.time_maa_r":
            return 1 - ramp ** (to_last**3)
        case "att.time_maa_w2" | "att.time_decay_w2":
            return torch.empty(parameter.shape).uniform_(-0.01, 0.01, generator=generator)
        case _ if name in _ZERO or name.endswith("_w1"):
            return torch.zeros_like(parameter)
        case _:
            return orthogonal(parameter, 0.1 if name in ("att.key.weight", "att.gate.weight") else 1.0, generator)


def _decay_or_bonus(name: str, place: Place) -> Tensor:
    channel, last = torch.arange(place.shape.dim_att), place.shape.dim_att - 1
    if name == "att.time_decay":
        return -6 + 5 * (channel / last) ** (0.7 + 1.3 * place.depth)
    return place.depth * (1 - channel / last) + ((channel + 1) % 3 - 1) * 0.1
