"""The model of a run: its shape, from the checkpoint or the flags, and its weights."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.devices.device import COMPUTE_DTYPES
from rwkv_dpo.kernels.backends import choose_backend
from rwkv_dpo.model.checkpoint import empty_model, load_into, read_checkpoint, shape_of
from rwkv_dpo.model.init import init_weights
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.model.shape import SHAPE_FLAGS, ModelShape, check_flags, shape_of_flags
from rwkv_dpo.run.settings import RunSettings
from rwkv_dpo.tuning.tuning import keep_small

log = logging.getLogger(__name__)


def expected_shape(settings: RunSettings, given: frozenset[str]) -> ModelShape:
    """resolve_shape for a dry run, which needs no checkpoint: the flags give the shape of one that doesn't exist."""
    s = settings.model
    if s.load_partial:
        return shape_of_flags(s)
    if not s.load_model or Path(s.load_model).exists():
        return resolve_shape(settings, given)[0]
    missing = [f"--{name}" for name in ("n_layer", "n_embd", "vocab_size") if name not in given or not getattr(s, name)]
    if missing:
        refuse(f"--load_model {s.load_model}: no such file; --dry_run 1 can do without if flags give its shape: {', '.join(missing)}")
    log.warning("--load_model %s does not exist: its shape is taken from the flags", s.load_model)
    return shape_of_flags(s)


def resolve_shape(settings: RunSettings, given: frozenset[str]) -> tuple[ModelShape, dict[str, torch.Tensor] | None]:
    """The model's shape and, if one is loaded, the checkpoint's weights. The file decides; given flags must agree. vocab_size may stay 0:
    then it comes from the corpus.
    """
    s, strategy = settings.model, settings.devices.strategy
    from_flags = shape_of_flags(s)
    if not s.load_model or settings.general.my_pile_stage == 1:
        return from_flags, None
    weights = read_checkpoint(s.load_model, partial=s.load_partial == 1)
    if strategy.startswith("deepspeed_stage_3") and any(name.endswith(".time_state") for name in weights):
        refuse(f"--strategy {strategy}: {s.load_model} has tuned states, which stage 3 doesn't shard; stages 1 and 2, and ddp, work")
    if s.load_partial:
        return from_flags, weights
    shape = shape_of(weights, s.load_model)
    wanted = {field: getattr(from_flags, field) for field, flag in SHAPE_FLAGS.items() if flag in given and getattr(s, flag)}
    if s.my_testing:
        wanted["version"] = from_flags.version
    check_flags(shape, wanted, s.load_model)
    return replace(shape, head_size_divisor=s.head_size_divisor), weights


def build_model(settings: RunSettings, shape: ModelShape, weights: dict[str, torch.Tensor] | None, device: torch.device) -> RWKV:
    """The model on the CPU, with the checkpoint's weights, or initial ones. Chooses the recurrence for `device`."""
    if shape.vocab_size < 1:
        refuse("--vocab_size is needed without --load_model (65536 for the RWKV World vocabulary)")
    s = settings.model
    wkv = choose_backend(shape.version, settings.devices.wkv_backend, device).wkv
    model = empty_model(shape, wkv, COMPUTE_DTYPES[settings.devices.precision], grad_cp=s.grad_cp, dropout=s.dropout)
    model.finds_collisions = settings.objective.uses_pairs and settings.objective.dpo_wpo == 1
    keep_small(model, settings.tuning)
    if weights is None or s.load_partial:
        init_weights(model, settings.optimizer.lr_init, settings.general.seed)
    if weights is not None:
        load_into(model, weights, s.load_model, partial=s.load_partial == 1)
    return model
