"""An optimizer's state by parameter name, unsharded and on the CPU, whatever strategy holds it, so that another strategy can restore it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor, nn

# By parameter name, by the optimizer's own key ("exp_avg", "step", ...): tensors and plain numbers.
OptimizerState = dict[str, dict[str, Any]]


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters, by name."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def read_state(trainer: pl.Trainer, model: nn.Module) -> OptimizerState:
    """Every rank has to call this; only rank 0's result is meaningful."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return _read_sharded(trainer.strategy.deepspeed_engine.optimizer, model)
    state = trainer.optimizers[0].state
    return {name: {key: _plain(key, value) for key, value in state[p].items()} for name, p in trainable(model) if p in state}


def write_state(trainer: pl.Trainer, model: nn.Module, form: OptimizerState, tensor: Callable[[str, str], Tensor]) -> None:
    """Give a newly created optimizer the state of `form`. Every rank has to call this. form: as read_state's, with tensors of the meta
    device; `tensor(name, key)` returns their values, on the device of the run, and is called in the same order on every rank."""
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        return _write_sharded(trainer.strategy.deepspeed_engine.optimizer, model, form, tensor)
    optimizer = trainer.optimizers[0]
    for name, parameter in trainable(model):
        if name in form:
            values: dict[str, Any] = {key: tensor(name, key) if isinstance(v, Tensor) else v for key, v in form[name].items()}
            if "step" in values:
                values["step"] = _step_for(optimizer, values["step"], parameter.device)
            optimizer.state[parameter] = values


def _plain(key: str, value: Any) -> Any:
    if key == "step":
        return float(value)
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _step_for(optimizer: torch.optim.Optimizer, step: float, device: torch.device) -> Tensor | int:
    """torch's optimizers count in a tensor, fused ones in one on the device; others in an int."""
    if type(optimizer).__module__.startswith("torch.optim"):
        on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        return torch.tensor(step, dtype=torch.float32, device=device if on_device else "cpu")
    return int(step)


def _flat_partitions(zero: Any) -> list[Tensor]:
    """What DeepSpeed's inner optimizer updates: this rank's part of the parameters, concatenated, in fp32."""
    return zero.fp32_partitioned_groups_flat if hasattr(zero, "fp32_partitioned_groups_flat") else zero.single_partition_of_fp32_groups


def _link(zero: Any) -> None:
    """Stages 1 and 2 find a parameter's part of the flat state through links, which they create after the first parameter group's first
    step, when the other groups have no state yet."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def _read_sharded(zero: Any, model: nn.Module) -> OptimizerState:
    from deepspeed.utils import safe_get_full_optimizer_state

    flat = _flat_partitions(zero)[0]
    inner = zero.optimizer.state.get(flat, {})
    full = [key for key, value in inner.items() if isinstance(value, Tensor) and value.shape == flat.shape]
    rest = {key: _plain(key, value) for key, value in inner.items() if key not in full}
    if not full:  # no step has been taken yet
        return {}
    _link(zero)
    return {name: {key: safe_get_full_optimizer_state(p, key).cpu() for key in full} | rest for name, p in trainable(model)}


def _write_sharded(zero: Any, model: nn.Module, form: OptimizerState, tensor: Callable[[str, str], Tensor]) -> None:
    if not form:
        return
    first = next(iter(form.values()))
    full = [key for key, value in first.items() if isinstance(value, Tensor)]
    step = max(state["step"] for state in form.values())
    for flat in _flat_partitions(zero):
        inner = {key: torch.zeros_like(flat) for key in full}
        zero.optimizer.state[flat] = {"step": _step_for(zero.optimizer, step, flat.device), **inner}
    _link(zero)
    for name, parameter in trainable(model):
        for key in full if name in form else ():
            set_sharded(parameter, tensor(name, key), key)


def set_sharded(parameter: Any, value: Tensor, key: str = "") -> None:
    """Give every rank its part of a parameter's state, or, without a key, of its fp32 master weights."""
    from deepspeed import utils

    key_of_it = (key,) if key else ()
    if not hasattr(parameter, "ds_tensor"):
        (utils.safe_set_full_optimizer_state if key else utils.safe_set_full_fp32_param)(parameter, value, *key_of_it)
        return
    # ZeRO-3 pads to equal parts, and its functions for whole values cut beyond the end on the last rank.
    n, n_ranks = parameter.ds_tensor.ds_numel, torch.distributed.get_world_size()
    padded = torch.nn.functional.pad(value.flatten(), (0, n * n_ranks - value.numel()))
    mine = padded.narrow(0, n * torch.distributed.get_rank(), n)
    (utils.safe_set_local_optimizer_state if key else utils.safe_set_local_fp32_param)(parameter, mine, *key_of_it)
