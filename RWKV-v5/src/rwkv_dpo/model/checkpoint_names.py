"""Weights as trainers and converters leave them, brought to the official names and shapes."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rwkv_dpo.base.errors import refuse

log = logging.getLogger(__name__)

# Under which key training programs keep the weights, beside optimizer states, schedules and settings.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# What wrapping a module puts before the names within it: DistributedDataParallel, torch.compile, Lightning's strategies, and the
# attribute that a Lightning module, or transformers, keeps the model in. FSDP and activation checkpointing wrap blocks.
_BEFORE = re.compile(r"(?:(?:module|_orig_mod|_forward_module|model|rwkv)\.)+(?=(?:emb|embeddings|blocks|ln_out|head)\.)")
_WITHIN = re.compile(r"(?<=\.)(?:_orig_mod|_forward_module|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# transformers' names of the same weights.
_RENAMED = (
    (re.compile(r"^embeddings\."), "emb."), (re.compile(r"^blocks\.0\.pre_ln\."), "blocks.0.ln0."),
    (re.compile(r"^(blocks\.\d+\.)attention\."), r"\1att."), (re.compile(r"^(blocks\.\d+\.)feed_forward\."), r"\1ffn."),
    (re.compile(r"\.time_mix_([kvrg])(?:ey|alue|eceptance|ate)$"), r".time_mix_\1"),
)  # fmt: skip
# Token mixes of all versions, and what RWKV-7 adds to each token's logits or multiplies its keys by.
_OF_TOKENS = re.compile(r"\.(time_mix_\w|time_maa_[xwkvrg]|x_[rwkvag]|[wav]0|k_[ka])$")
_OFFICIAL = re.compile(r"(?:emb|ln_out|head|blocks\.[0-9]{1,9})\..+")


def official_weights(content: Any, path: object) -> dict[str, Tensor]:
    """The weights in the content of a file, by official names. Of a file in which a trainer wrapped them, what is no weight of the
    model is left out; tensors among it are told of. InputError when the content is no dictionary of weights, or holds one twice."""
    if not isinstance(content, Mapping) or not content:
        refuse(f"{path}: holds {type(content).__name__}; a dictionary of tensors, such as a model's state_dict(), is accepted")
    if "_strategy" in content and "_rescale_layer" in content:
        refuse(f"{path}: converted for inference by the rwkv package; the checkpoint that it was converted from is accepted")
    within = _unwrapped(content)
    names = {name: _official_name(name) if isinstance(name, str) else "" for name in within}
    is_wrapped = within is not content or any(official != name for name, official in names.items() if isinstance(name, str))
    weights: dict[str, Tensor] = {}
    left_out: list[str] = []
    for name, value in within.items():
        official = names[name]
        if is_wrapped and not _OFFICIAL.fullmatch(official):
            left_out += [str(name)] if isinstance(value, Tensor) else []
            continue
        if not official or not isinstance(value, Tensor) or not value.is_floating_point():
            held = value.dtype if isinstance(value, Tensor) else type(value).__name__
            refuse(f"{path}: entry {name!r} holds {held}; floating-point tensors are accepted")
        if official in weights:
            refuse(f"{path}: holds {official} twice, once as {name}")
        weights[official] = _official_shape(official, value)
    if left_out:
        log.info("%s: %d tensors beside the model's weights are left out (%s ...)", path, len(left_out), left_out[0])
    return weights


def _unwrapped(content: Mapping) -> Mapping:
    """The dictionary that holds the weights: the content itself, or what it keeps under a wrapper's key."""
    for key in _WRAPPERS:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(name, str) and _OFFICIAL.fullmatch(_official_name(name)) for name in inner):
            return inner
    return content


def _official_name(name: str) -> str:
    name = _WITHIN.sub("", name)
    if before := _BEFORE.match(name):
        name = name[before.end() :]
    for pattern, replacement in _RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _official_shape(name: str, value: Tensor) -> Tensor:
    """Vectors that meet tokens are [1, 1, C] in official files, and [C] where a program has squeezed them."""
    is_vector = value.dim() < 3 and value.numel() == max(value.shape, default=0)
    return value.reshape(1, 1, -1) if is_vector and _OF_TOKENS.search(name) else value


def with_tied_head(weights: dict[str, Tensor], path: object) -> dict[str, Tensor]:
    """The same, with a head where a model that shares its embedding with the head stored one matrix alone."""
    if "head.weight" in weights or "emb.weight" not in weights:
        return weights
    log.info("%s: has no head.weight; emb.weight is taken for both, as two matrices from here on", path)
    return {**weights, "head.weight": weights["emb.weight"]}
