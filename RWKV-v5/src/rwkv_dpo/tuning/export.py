"""Plain checkpoints of tuned models, verified before they take their name."""

import math
from pathlib import Path

import torch
from torch import Tensor

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.files.hashed import remove_hashed, rename_hashed
from rwkv_dpo.model.checkpoint import load_model, read_weights, save_weights
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.tuning.adapters import merged_weights
from rwkv_dpo.tuning.base import base_of, save_states
from rwkv_dpo.tuning.states import add_states
from rwkv_dpo.tuning.tuning import load_tuned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Tokens whose logits are compared.
_N_TOKENS = 64


def export(base: str, tuned: str, out: Path, dtype: torch.dtype, wkv_backend: str = "auto", any_base: bool = False) -> float:
    """Writes the model `base`, with the adapter folder `tuned` merged in, to `out`; a state file passes through by itself.

    Returns the difference of logits before and after, relative to their size; refuses one that rounding to dtype doesn't explain.
    """
    is_state = bool(tuned) and not Path(tuned).is_dir()
    model = _load(base, wkv_backend)
    if tuned:
        load_tuned(model, tuned, base, any_base)
    before = _logits(model)
    weights = read_weights(tuned) if is_state else merged_weights(model)
    unverified = out.with_name(f".unverified.{out.name}")
    try:
        rounded = {name: value.to(dtype) for name, value in weights.items()}
        save_states(rounded, unverified, base_of(tuned)) if is_state else save_weights(rounded, unverified)
        difference = _relative(_logits(_read_back(unverified, base, is_state, wkv_backend)), before)
        bound = rounding_bound(dtype, model.shape.n_layer)
        if not difference <= bound:
            refuse(f"{out}: not written: its logits would differ by {difference:.2g} of their size, and rounding explains {bound:.2g}")
        rename_hashed(unverified, out)
    finally:
        remove_hashed(unverified)
    return difference


def rounding_bound(dtype: torch.dtype, n_layer: int) -> float:
    """Of the root mean square difference of logits, relative to theirs, when every weight is rounded to dtype.

    A matrix with independent roundings, a fifth of eps each on average, gives its products a relative error of as much; of about 3
    matrices in a row in each layer and the head, errors add up as their squares. Five times that, and for two fp32 computations
    with sums in another order 64 fp32 roundings.
    """
    return (torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps) * math.sqrt(3 * n_layer + 1)


def _load(path: str | Path, wkv_backend: str) -> RWKV:
    return load_model(path, device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend=wkv_backend)


def _read_back(path: Path, base: str, is_state: bool, wkv_backend: str) -> RWKV:
    """A new model from what was written."""
    if not is_state:
        return _load(path, wkv_backend)
    again = _load(base, wkv_backend)
    add_states(again, read_weights(path))
    return again


@torch.no_grad()
def _logits(model: RWKV) -> Tensor:
    builder = ForestBuilder()
    builder.add(torch.randint(model.shape.vocab_size, (_N_TOKENS,), generator=torch.Generator().manual_seed(0)).numpy())
    return model.head(model(builder.build()[0])[0])


def _relative(after: Tensor, before: Tensor) -> float:
    return float((after - before).square().mean().sqrt() / before.square().mean().sqrt())
