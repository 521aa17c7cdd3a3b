"""AdamW and its parameter groups, with RWKV-LM's layer-wise learning rates."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rwkv_dpo.base.libraries import bitsandbytes, check_package
from rwkv_dpo.optimizer.adamw_bf16 import AdamWBF16
from rwkv_dpo.optimizer.schedule import Schedule, lr_at, weight_decay_at
from rwkv_dpo.optimizer.settings import OptimizerSettings


def lr_scale(name: str, pile_stage: int) -> float:
    """How many times the base rate a parameter learns at, by its official name."""
    last = name.rsplit(".", 1)[-1]
    if pile_stage == 2 and last.startswith(("time_decay", "time_faaaa", "time_mix", "time_maa")):
        return 1.0 if last.endswith(("_w1", "_w2")) else 5.0
    return {"time_decay": 2.0, "time_first": 3.0, "w0": 2.0}.get(last, 1.0)


def parameter_groups(parameters: Iterable[tuple[str, Tensor]], settings: OptimizerSettings, pile_stage: int = 0) -> list[dict]:
    """Groups by learning-rate scale and weight decay. Embedding, head and projections decay; token mixes, decays, low-rank parts, norms
    and biases don't."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in parameters:
        scale = lr_scale(name, pile_stage) if settings.layerwise_lr else 1.0
        decays = parameter.squeeze().dim() >= 2 and name.endswith(".weight")
        groups.setdefault((scale, decays), []).append(parameter)
    return [
        {"params": params, "lr_scale": scale, "decays": decays, "weight_decay": settings.weight_decay if decays else 0.0}
        for (scale, decays), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_optimizer(
    parameters: Iterable[tuple[str, Tensor]], settings: OptimizerSettings, pile_stage: int = 0, seed: int = 0, offload: bool = False
) -> torch.optim.Optimizer:
    """--optim over parameters by name. seed: of stochastic rounding. offload: DeepSpeed keeps the optimizer's state in host memory and
    wants its own Adam for it."""
    groups = parameter_groups(parameters, settings, pile_stage)
    adam: dict[str, Any] = {"lr": settings.lr_init, "betas": (settings.beta1, settings.beta2), "eps": settings.adam_eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **adam)
    match settings.optim:
        case "adamw_bf16state":
            return AdamWBF16(groups, seed=seed, **adam)
        case "adamw8bit":
            return bitsandbytes("optim").AdamW8bit(groups, **adam)
    return torch.optim.AdamW(groups, fused=True, **adam)


def check_optim(settings: OptimizerSettings) -> None:
    """Refuses an optimizer whose library is not there, before a run begins."""
    if settings.optim == "adamw8bit":
        check_package("bitsandbytes", "--optim adamw8bit", "adamw_bf16state needs nothing and saves half")


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, first_step: int, steps_since_start: int) -> tuple[float, float]:
    """Sets learning rates and weight decay for the coming optimizer step; returns the base rate and the decay. first_step: the schedule's,
    at which the run began."""
    step = first_step + steps_since_start
    lr, decay = lr_at(schedule, step, steps_since_start), weight_decay_at(schedule, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = decay if group["decays"] else 0.0
    return lr, decay
