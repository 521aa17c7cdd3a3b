"""Adapter folders in peft's form: adapter_config.json and adapter_model.safetensors, which peft itself reads.

Weights that were trained beside the adapter stand in the same file under their official names; peft loads them too. A PiSSA
adapter stands there as the LoRA that has its effect on the original matrices, [A; A0] and [B, -B0], and says so in the file's
metadata.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.files.tensor_files import read_safetensors, write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METHODS = ("lora", "dora", "pissa", "rslora")
# What peft.PeftModel puts before the names of the model that it wraps.
PREFIX = "base_model.model."
# Settings of peft that change the function and that we don't have, with the values that mean "without".
_NEUTRAL: dict[str, tuple] = {
    "peft_type": ("LORA",), "bias": ("none", None), "lora_bias": (False, None), "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "modules_to_save": ([], None), "target_parameters": ([], None),
    "layer_replication": (None,), "alora_invocation_tokens": (None,), "trainable_token_indices": (None,), "use_qalora": (False, None),
}  # fmt: skip
# JSON's integers have no end, and one of hundreds of digits has no quotient alpha / r.
_MAX_ALPHA = 2**31
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class SavedAdapter:
    """tensors: A, B and magnitudes by "blocks.0.att.key.lora_A.weight"; extra: other weights by their official names."""

    path: Path
    method: str
    r: int
    alpha: int
    tensors: dict[str, Tensor]
    extra: dict[str, Tensor]

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The modules that it adapts, by name."""
        return tuple(name.removesuffix(".lora_A.weight") for name in self.tensors if name.endswith(".lora_A.weight"))

    def split(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A and B as they are, and as they started (for PiSSA; else nothing)."""
        if self.method != "pissa":
            return self.tensors, {}
        now, start = {}, {}
        for name, value in self.tensors.items():
            if ".lora_A." in name:
                now[name], start[name] = value[: self.r], value[self.r :].clone()
            else:
                now[name], start[name] = value[:, : self.r].contiguous(), -value[:, self.r :]
        return now, start


def write_adapter(folder: Path, config: Any, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """config: peft's. metadata: "method", and what base.py keeps. tensors: as in SavedAdapter, the extra ones among them."""
    write_safetensors({PREFIX + name: value.float() for name, value in tensors.items()}, folder / WEIGHTS, metadata)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def read_adapter(folder: str | Path) -> SavedAdapter:
    """Refuses folders that are missing, truncated, of another kind than LoRA, or of a form of it that we don't compute."""
    path = Path(folder)
    config = _read_config(path / CONFIG)
    for name, accepted in _NEUTRAL.items():
        if config.get(name, accepted[0]) not in accepted:
            refuse(f"{path}: {CONFIG} has {name} {config[name]!r}; {accepted[0]!r} is accepted")
    if not (path / WEIGHTS).is_file():
        refuse(f"{path / WEIGHTS}: no such file")
    tensors, metadata = read_safetensors(path / WEIGHTS)
    tensors = {name.removeprefix(PREFIX): value.float() for name, value in tensors.items()}
    method = metadata.get("method") or ("dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        refuse(
            f"{path}: its base model was changed at the start (init_lora_weights {config['init_lora_weights']!r}), and the folder doesn't "
            "hold how; peft's path_initial_model_for_weight_conversion saves such an adapter as a plain LoRA"
        )
    adapter = {name: value for name, value in tensors.items() if ".lora_" in name}
    r, alpha = config.get("r"), config.get("lora_alpha")
    if type(r) is not int or type(alpha) is not int or r < 1 or abs(alpha) > _MAX_ALPHA or not adapter:
        refuse(f"{path}: not a LoRA adapter (r {r!r}, lora_alpha {alpha!r}, {len(adapter)} tensors)")
    for name, value in adapter.items():
        ranks = [value.shape[dim] for part, dim in ((".lora_A.", 0), (".lora_B.", 1)) if part in name and value.dim() == 2]
        if ranks not in ([r], []) or (not ranks and not name.endswith("lora_magnitude_vector")):
            refuse(f"{path / WEIGHTS}: {name} has shape {tuple(value.shape)}, and {CONFIG} r {r}")
    if method not in METHODS:
        refuse(f"{path / WEIGHTS}: its metadata names the method {method!r}; accepted are {', '.join(METHODS)}")
    if method == "pissa":
        r, alpha = r // 2, alpha // 2
    saved = SavedAdapter(path, method, r, alpha, adapter, {n: x for n, x in tensors.items() if n not in adapter})
    parts = ("lora_A.weight", "lora_B.weight", *(("lora_magnitude_vector",) if method == "dora" else ()))
    expected = {f"{module}.{part}" for module in saved.modules for part in parts}
    if expected != adapter.keys():
        odd = sorted(expected ^ adapter.keys())
        refuse(f"{path / WEIGHTS}: {odd[0]} is {'missing' if odd[0] in expected else 'unexpected'} in a {method} adapter")
    return saved


def _read_config(path: Path) -> dict:
    if not path.is_file():
        refuse(f"{path}: no such file; an adapter is a folder with {CONFIG} and {WEIGHTS}")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse(f"{path}: not readable as JSON ({error})")
    return config if isinstance(config, dict) else refuse(f"{path}: not a JSON object")
