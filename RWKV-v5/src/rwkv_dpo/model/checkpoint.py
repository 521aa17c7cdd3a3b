"""Official RWKV files, .pth or .safetensors: the shape is read off them, loading is strict and runs no code, saving is atomic."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_dpo.atomic import hashed_write
from rwkv_dpo.errors import InputError, refuse
from rwkv_dpo.model import v5
from rwkv_dpo.model.rwkv import RWKV, Mixes
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.model.tensor_files import is_safetensors, read_safetensors, write_safetensors
from rwkv_dpo.wkv import WKV5, choose_backend

Weights = Mapping[str, Tensor]

# Version by a weight that only it has. Versions we can't run are named, so that the refusal can be too.
_SIGNS = (
    ("blocks.0.att.x_r", "7"),
    ("blocks.0.att.time_maa_x", "6"),
    ("blocks.0.att.time_mix_g", "5"),
    ("blocks.0.att.ln_x.weight", "5.0 or 5.1"),
    ("blocks.0.att.time_first", "4"),
)
_MIXES: dict[str, Mixes] = {"5": v5.MIXES}
# Which flag sets which number of a ModelShape.
SHAPE_FLAGS = {
    "n_layer": "n_layer", "n_embd": "n_embd", "dim_att": "dim_att", "dim_ffn": "dim_ffn", "vocab_size": "vocab_size",
    "head_size": "head_size_a",
}  # fmt: skip


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file by name, on the CPU (memory-mapped where a .pth allows). Refuses files that are
    missing, torn, hold anything but tensors, or would execute code. Prefixes that trainers leave behind are dropped."""
    path = Path(path)
    if not path.is_file():
        refuse(f"{path}: no such checkpoint")
    if is_safetensors(path):
        return read_safetensors(path)[0]
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a readable .pth file of plain tensors ({reason})") from error
    if not isinstance(loaded, dict) or not loaded:
        refuse(f"{path}: holds {type(loaded).__name__}; a dictionary of tensors is accepted")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            refuse(f"{path}: entry {name!r} holds {type(value).__name__}; floating-point tensors are accepted")
    return {name.removeprefix("_forward_module."): value for name, value in loaded.items()}


def version_of(weights: Weights, path: str | Path) -> str:
    version = next((version for sign, version in _SIGNS if sign in weights), None)
    if version is None:
        refuse(f"{path}: not an RWKV checkpoint (no blocks.0.att.* weights of a known version)")
    if version not in _MIXES:
        refuse(f"{path}: an RWKV-{version} checkpoint; supported: RWKV-{', RWKV-'.join(_MIXES)}")
    return version


def shape_of(weights: Weights, path: str | Path) -> ModelShape:
    """Depth, widths, vocabulary and head size, read off the weights."""
    version_of(weights, path)

    def size(name: str, dim: int, n_dims: int = 2) -> int:
        if name not in weights:
            refuse(f"{path}: {name} is missing")
        if weights[name].dim() != n_dims:
            refuse(f"{path}: {name} has shape {tuple(weights[name].shape)}; {n_dims} dimensions are accepted")
        return weights[name].shape[dim]

    layers = {int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d+)\.", name))}
    return ModelShape(
        n_layer=max(layers) + 1,
        n_embd=size("emb.weight", 1),
        dim_att=size("blocks.0.att.receptance.weight", 0),
        dim_ffn=size("blocks.0.ffn.key.weight", 0),
        vocab_size=size("emb.weight", 0),
        head_size=size("blocks.0.att.time_decay", 1),
    )


def check_flags(shape: ModelShape, wanted: Mapping[str, int], path: str | Path) -> None:
    """Refuses numbers of `wanted` (by ModelShape field) that contradict the checkpoint, naming their flags."""
    wrong = [
        f"--{SHAPE_FLAGS[field]} {value} (the file has {getattr(shape, field)})"
        for field, value in wanted.items()
        if value != getattr(shape, field)
    ]
    if wrong:
        refuse(f"{path}: contradicts {', '.join(wrong)}")


def empty_model(shape: ModelShape, version: str, wkv: WKV5, compute_dtype: torch.dtype, grad_cp: str = "0", dropout: float = 0.0) -> RWKV:
    """A model whose weights are not yet set (fp32, on the CPU)."""
    if shape.dim_att % shape.head_size:
        refuse(f"--dim_att {shape.dim_att} is not a multiple of --head_size_a {shape.head_size}")
    return RWKV(shape, _MIXES[version], wkv, compute_dtype, grad_cp, dropout)


def load_into(model: RWKV, weights: Weights, path: str | Path, partial: bool = False) -> None:
    """Copies the weights, strictly: names and shapes must agree. `partial` leaves weights that the file lacks as they are."""
    own = dict(model.named_parameters())
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


def load_model(path: str | Path, *, device: torch.device, compute_dtype: torch.dtype, wkv_backend: str = "auto") -> RWKV:
    """The model of a checkpoint, to run: fp32 weights on `device`, computing in compute_dtype."""
    weights = read_weights(path)
    model = empty_model(shape_of(weights, path), version_of(weights, path), choose_backend(wkv_backend, device).wkv5, compute_dtype)
    load_into(model, weights, path)
    return model.to(device).eval()


def save_weights(weights: Weights, path: str | Path) -> None:
    """Writes a file atomically, with its .sha256 beside it: safetensors for a name that ends so, else .pth."""
    with hashed_write(path) as file:
        if str(path).endswith(".safetensors"):
            file.fill(lambda unfinished: write_safetensors(weights, unfinished))
        else:
            values = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
            torch.save(values, file)  # type: ignore[arg-type]  # it only writes


def _some(names: list[str], limit: int = 4) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
