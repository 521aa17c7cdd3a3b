"""Initial weights as RWKV-LM makes them for RWKV-5.

Token mixes and decays follow the layer's depth; what writes into the residual stream, and the channel mix's gate, start at
zero; the embedding is tiny (ln0 scales it up); everything else is orthogonal.
"""

import math

import torch
from torch import Tensor

from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.model.shape import ModelShape

_ZERO = ("att.output.weight", "ffn.value.weight", "ffn.receptance.weight")


@torch.no_grad()
def init_weights(model: RWKV, lr_init: float, seed: int) -> None:
    """Fills every weight of an RWKV-5 model. lr_init sets the embedding's range, as in RWKV-LM."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("blocks."):
            layer, rest = name.removeprefix("blocks.").split(".", 1)
            value = _block_weight(rest, parameter, model.shape, int(layer), generator)
        elif name == "emb.weight":
            value = torch.empty_like(parameter, device="cpu").uniform_(-lr_init, lr_init, generator=generator)
        elif name == "head.weight":
            gain = 0.5 * math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1]))
            value = _orthogonal(parameter, gain, generator)
        else:  # ln_out
            value = torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter)
        parameter.copy_(value)


def _block_weight(name: str, parameter: Tensor, shape: ModelShape, layer: int, generator: torch.Generator) -> Tensor:
    depth = layer / max(shape.n_layer - 1, 1)  # 0 at the first layer, 1 at the last
    to_last = 1 - layer / shape.n_layer  # 1 at the first layer, 1/n_layer at the last
    ramp = torch.arange(shape.n_embd) / shape.n_embd
    channel = torch.arange(shape.dim_att)
    match name:
        case "att.time_decay":
            return (-6 + 5 * (channel / (shape.dim_att - 1)) ** (0.7 + 1.3 * depth)).view(parameter.shape)
        case "att.time_faaaa":
            return (depth * (1 - channel / (shape.dim_att - 1)) + ((channel + 1) % 3 - 1) * 0.1).view(parameter.shape)
        case "att.time_mix_k" | "ffn.time_mix_k" | "ffn.time_mix_r":
            return (ramp**to_last).view(parameter.shape)
        case "att.time_mix_v":
            return (ramp**to_last + 0.3 * depth).view(parameter.shape)
        case "att.time_mix_r" | "att.time_mix_g":
            return (ramp ** (0.5 * to_last)).view(parameter.shape)
        case "att.ln_x.weight":
            return torch.full_like(parameter, ((1 + layer) / shape.n_layer) ** 0.7)
        case _ if ".ln" in f".{name}":
            return torch.ones_like(parameter) if name.endswith("weight") else torch.zeros_like(parameter)
        case _ if name in _ZERO:
            return torch.zeros_like(parameter)
        case _:
            return _orthogonal(parameter, math.sqrt(max(1.0, parameter.shape[0] / parameter.shape[1])), generator)


def _orthogonal(parameter: Tensor, gain: float, generator: torch.Generator) -> Tensor:
    return torch.nn.init.orthogonal_(torch.empty(parameter.shape), gain=gain, generator=generator)
