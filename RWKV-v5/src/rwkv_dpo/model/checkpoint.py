"""Official RWKV files, .pth or .safetensors: the shape is read off them, loading is strict and runs no code, saving is atomic."""

import mmap
import os
import pickletools
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
from rwkv_dpo.pickles import scan_pickle
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
    missing, torn, hold anything but tensors, would execute code, or promise more than they hold. Prefixes that trainers leave
    behind are dropped."""
    path = Path(path)
    if not os.path.isfile(path):
        refuse(f"{path}: no such checkpoint")
    if is_safetensors(path):
        return read_safetensors(path)[0]
    try:
        is_zip = zipfile.is_zipfile(path)
        (_scan_zip if is_zip else _scan_old)(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    # A damaged file can fail anywhere in torch, zipfile or the unpickler, and they promise no particular exception.
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a readable .pth file of plain tensors ({reason})") from error
    if not isinstance(loaded, dict) or not loaded:
        refuse(f"{path}: holds {type(loaded).__name__}; a dictionary of tensors is accepted")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            refuse(f"{path}: entry {name!r} holds {type(value).__name__}; floating-point tensors are accepted")
    # Shapes are read from tensors, and a tensor can have any shape with no storage, or one number repeated.
    n_bytes = sum(value.numel() * value.element_size() for value in loaded.values())
    if any(value.device.type != "cpu" or value.layout != torch.strided for value in loaded.values()) or n_bytes > path.stat().st_size:
        refuse(f"{path}: its tensors have {n_bytes} bytes and the file {path.stat().st_size}; tensors that share memory are not accepted")
    return {name.removeprefix("_forward_module."): value for name, value in loaded.items()}


# What torch.save writes for a dictionary of tensors. torch's own list has more, some of which allocates whatever is asked for.
_NAMES = re.compile(
    r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter\.Parameter"
    r"|torch(\.storage)?\.(?!Untyped|Typed|_)\w+Storage"
)
_OPCODES = frozenset(opcode.name for opcode in pickletools.opcodes if opcode.name not in ("STACK_GLOBAL", "INST"))


def _scan(content: bytes | mmap.mmap, at: int = 0) -> int:
    end, names = scan_pickle(content, at, _OPCODES)
    if foreign := sorted(name for name in names if not _NAMES.fullmatch(name)):
        raise ValueError(f"it names {foreign[0]}")
    return end


def _scan_zip(path: Path) -> None:
    """ValueError when an archive's members are compressed, or larger than it, or its pickle is not one of plain tensors."""
    n_bytes = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size or member.file_size > n_bytes:
                raise ValueError(f"{member.filename} is compressed, or larger than the file")
        (pickled,) = (member for member in archive.infolist() if member.filename.endswith("/data.pkl"))
        _scan(archive.read(pickled))


def _scan_old(path: Path) -> None:
    """The same for torch's format before archives: pickles of a magic number, a version, system facts, the tensors and the storages'
    names, one after the other, then the storages."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        at = 0
        for _ in range(5):
            at = _scan(content, at)


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

    layers = {int(match[1]) for name in weights if (match := re.match(r"blocks\.([0-9]{1,9})\.", name))}
    shape = ModelShape(
        n_layer=max(layers) + 1,
        n_embd=size("emb.weight", 1),
        dim_att=size("blocks.0.att.receptance.weight", 0),
        dim_ffn=size("blocks.0.ffn.key.weight", 0),
        vocab_size=size("emb.weight", 0),
        head_size=size("blocks.0.att.time_decay", 1),
    )
    if len(layers) < shape.n_layer:
        refuse(f"{path}: has weights of {len(layers)} layers, the last of which is number {shape.n_layer - 1}")
    if empty := [field for field in SHAPE_FLAGS if getattr(shape, field) < 1]:
        refuse(f"{path}: its weights have no numbers ({', '.join(empty)} 0)")
    return shape


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
