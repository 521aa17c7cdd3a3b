"""Official RWKV files, .pth or .safetensors: the shape is read off them, loading is strict and runs no code, saving is atomic."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.files.hashed import hashed_write
from rwkv_dpo.files.kinds import refuse_others
from rwkv_dpo.files.tensor_files import is_safetensors, read_safetensors, write_safetensors
from rwkv_dpo.files.torch_files import CHECKPOINTS, check_stored, load_torch
from rwkv_dpo.kernels.backends import WKV, choose_backend
from rwkv_dpo.model import v5, v6, v7
from rwkv_dpo.model.checkpoint_names import official_weights, with_tied_head
from rwkv_dpo.model.quantized import quantize, quantized
from rwkv_dpo.model.rwkv import RWKV, Mixes
from rwkv_dpo.model.shape import SHAPE_FLAGS, ModelShape

Weights = Mapping[str, Tensor]

# Version by a weight that only it has. Versions we can't run are named, so that the refusal can be too.
_SIGNS = (
    ("blocks.0.qkv.qq.weight", "7b"),
    ("blocks.0.ffn.s_emb.weight", "7a"),
    ("blocks.0.att.x_r", "7"),
    ("blocks.0.att.time_maa_x", "6"),
    ("blocks.0.att.gate.weight", "5"),
    ("blocks.0.att.ln_x.weight", "5.0"),
    ("blocks.0.att.time_first", "4"),
)
MIXES: dict[str, Mixes] = {mixes.version: mixes for mixes in (v5.MIXES, v6.MIXES, v7.MIXES)}
# What RWKV-LM's trainer writes and nothing reads.
_UNREAD = {f"blocks.0.att.v{number}" for number in range(3)}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file by official name, on the CPU (memory-mapped where a .pth allows). Refuses files that
    are missing, truncated, hold other than floating-point weights, would execute code, or promise more than they hold. What trainers put
    around the weights, and before their names, is taken off (checkpoint_names.py)."""
    path = Path(path)
    if path.is_dir():
        refuse(f"{path}: a folder; {_in_folder(path)}")
    if not os.path.isfile(path):
        refuse(f"{path}: no such checkpoint{_nearby(path)}")
    if is_safetensors(path):
        return official_weights(read_safetensors(path)[0], path)
    content = load_torch(path)
    if not isinstance(content, dict):
        refuse_others(path, "a checkpoint", CHECKPOINTS)
    weights = official_weights(content, path)
    # One matrix may be stored for embedding and head alike.
    is_tied = "head.weight" in weights and _is_same(weights["head.weight"], weights.get("emb.weight"))
    check_stored((value for name, value in weights.items() if not (is_tied and name == "head.weight")), path)
    return weights


def _is_same(value: Tensor, other: Tensor | None) -> bool:
    if other is None or value.layout != torch.strided or other.layout != torch.strided:
        return False
    return value.data_ptr() == other.data_ptr() and value.shape == other.shape and value.stride() == other.stride()


def _nearby(path: Path) -> str:
    """What may have been meant: the rwkv package takes names without .pth, transformers those of the Hub."""
    if os.path.isfile(f"{path}.pth"):
        return f"; {path}.pth is one"
    is_hub_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)) and path.suffix not in (".pth", ".safetensors", ".ckpt", ".pt", ".bin")
    return f"; from the Hub it has to be downloaded first (hf download {path})" if is_hub_id else ""


def _in_folder(path: Path) -> str:
    """What to give in place of a folder."""
    if (path / "adapter_config.json").exists():
        return "an adapter is given as --peft_load, beside its base model"
    if (path / "zero_to_fp32.py").exists():
        return f"DeepSpeed's zero_to_fp32.py in it makes a checkpoint of its parts (python {path}/zero_to_fp32.py {path} FOLDER)"
    found = sorted(one.name for one in path.iterdir() if one.suffix in (".pth", ".safetensors", ".ckpt", ".pt", ".bin"))
    return f"a checkpoint is a file in it, such as {', '.join(found[:4])}" if found else "no checkpoint is in it"


def read_checkpoint(path: str | Path, partial: bool = False) -> dict[str, Tensor]:
    """The weights of a whole model, or with `partial` of some of it, as read_weights has them."""
    weights = read_weights(path)
    return weights if partial else with_tied_head(weights, path)


def version_of(weights: Weights, path: str | Path) -> str:
    """The model version of a checkpoint's weights. Refuses those that can't be run."""
    version = next((version for sign, version in _SIGNS if sign in weights), None)
    decay = weights.get("blocks.0.att.time_decay")
    if version == "5" and decay is not None and (decay.dim() < 2 or decay.shape[1] == 1):
        version = "5.1"  # one decay a head
    if version is None:
        refuse(f"{path}: {_no_model(weights)}")
    if version not in MIXES:
        refuse(f"{path}: an RWKV-{version} checkpoint; RWKV-5.2 (RWKV-5-World-...-v2), 6 (x060) and 7 (x070) are supported")
    return version


def _no_model(weights: Weights) -> str:
    """What a file of weights is that is no model."""
    if weights and all(name.endswith(".time_state") for name in weights):
        return "tuned states, which --peft state --peft_load takes, beside their base model as --load_model"
    if any(".lora_" in name for name in weights):
        return "holds a LoRA's matrices; merged into its base model by the program that trained it, it is a checkpoint"
    return "not an RWKV checkpoint (no blocks.0.att.* weights of a known version)"


def shape_of(weights: Weights, path: str | Path) -> ModelShape:
    """Depth, widths, vocabulary and head size, read off the weights."""
    version = version_of(weights, path)
    mixes = MIXES[version]

    def size(name: str, dim: int, n_dims: int = 2) -> int:
        if name not in weights:
            refuse(f"{path}: {name} is missing")
        if weights[name].dim() != n_dims:
            refuse(f"{path}: {name} has shape {tuple(weights[name].shape)}; {n_dims} dimensions are accepted")
        return weights[name].shape[dim]

    layers = {int(match[1]) for name in weights if (match := re.match(r"blocks\.([0-9]{1,9})\.", name))}
    shape = ModelShape(
        n_layer=max(layers) + 1,
        n_embd=size("emb.weight", 1),
        dim_att=size("blocks.0.att.receptance.weight", 0),
        dim_ffn=size("blocks.0.ffn.key.weight", 0),
        vocab_size=size("emb.weight", 0),
        head_size=size(f"blocks.0.{mixes.of_heads}", 1),
        version=version,
    )
    # The first layer of RWKV-7 lacks some.
    last = f"blocks.{shape.n_layer - 1}"
    ranks = (size(f"{last}.{name}", 1) if f"{last}.{name}" in weights else rank(shape.n_embd) for name, rank in mixes.ranks.items())
    shape = replace(shape, ranks=tuple(ranks))
    if len(layers) < shape.n_layer:
        refuse(f"{path}: has weights of {len(layers)} layers, the last of which is number {shape.n_layer - 1}")
    if empty := [field for field in SHAPE_FLAGS if getattr(shape, field) < 1]:
        refuse(f"{path}: its weights have no numbers ({', '.join(empty)} 0)")
    return shape


def empty_model(shape: ModelShape, wkv: WKV, compute_dtype: torch.dtype, grad_cp: str = "0", dropout: float = 0.0) -> RWKV:
    """A model whose weights are not yet set (fp32, on the CPU)."""
    if shape.dim_att % shape.head_size:
        refuse(f"--dim_att {shape.dim_att} is not a multiple of --head_size_a {shape.head_size}")
    mixes = MIXES[shape.version]
    if not shape.ranks:
        shape = replace(shape, ranks=tuple(rank(shape.n_embd) for rank in mixes.ranks.values()))
    return RWKV(shape, mixes, wkv, compute_dtype, grad_cp, dropout)


def load_into(model: RWKV, weights: Weights, path: str | Path, partial: bool = False) -> None:
    """Copies the weights, strictly: names and shapes must agree. `partial` leaves weights that the file lacks as they are. Tuned
    states among them become the model's."""
    if any(name.endswith(".att.time_state") for name in weights):
        model.add_time_states()
    own: dict[str, Any] = {**dict(model.named_parameters()), **quantized(model)}
    weights = {name: value for name, value in weights.items() if name in own or name not in _UNREAD}
    missing = [] if partial else sorted(own.keys() - weights.keys())
    unexpected = sorted(weights.keys() - own.keys())
    if missing or unexpected:
        parts = [f"{what} {_some(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
        refuse(f"{path}: {'; '.join(parts)}")
    wrong = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if weights[name].shape != own[name].shape
    ]
    if wrong:
        refuse(f"{path}: wrong shapes: {_some(wrong)}")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)


def load_model(
    path: str | Path, *, device: torch.device, compute_dtype: torch.dtype, wkv_backend: str = "auto", quant: str = "none"
) -> RWKV:  # fmt: skip
    """The model of a checkpoint, to run: fp32 weights on `device`, computing in compute_dtype. quant: the form of its projections
    (quantized.FORMS); none: as the others."""
    weights = read_checkpoint(path)
    shape = shape_of(weights, path)
    model = empty_model(shape, choose_backend(shape.version, wkv_backend, device).wkv, compute_dtype)
    quantize(model, quant, has_values=False)
    load_into(model, weights, path)
    return model.to(device).eval()


def save_weights(weights: Weights, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a file atomically, with its .sha256 beside it: safetensors, with `metadata`, for a name that ends so, else .pth."""
    with hashed_write(path) as file:
        if str(path).endswith(".safetensors"):
            file.fill(lambda unfinished: write_safetensors(weights, unfinished, metadata))
        else:
            values = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
            torch.save(values, file)  # type: ignore[arg-type]  # it only writes


def _some(names: list[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
