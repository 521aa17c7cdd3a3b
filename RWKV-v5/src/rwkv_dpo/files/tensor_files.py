"""Safetensors files: reading and writing dictionaries of floating-point tensors."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from rwkv_dpo.base.errors import InputError, refuse

# The format knows others, some of which torch holds but cannot convert.
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_safetensors(path: Path) -> bool:
    """By the content: eight bytes of length, then a JSON object. Neither an archive nor a pickle begins so."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by name, on the CPU, and the file's metadata. Refuses files that are truncated or hold other numbers."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    for name, value in tensors.items():
        if value.dtype not in _DTYPES:
            refuse(f"{path}: entry {name!r} holds {value.dtype}; accepted are {', '.join(map(str, _DTYPES))}")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Of a safetensors file that read_safetensors has accepted."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_safetensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Raises OSError when the file cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        save_file(values, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise OSError(str(error)) from error
