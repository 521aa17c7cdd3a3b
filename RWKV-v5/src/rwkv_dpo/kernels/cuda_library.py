"""What the CUDA kernels share: their library, made for the devices of this machine, and why it can't be used."""

import ctypes
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from rwkv_dpo.kernels.build import BuildError, EntryPoint, load_library
from rwkv_dpo.kernels.compilers import cuda_recipe


def load_kernels(source: Path, entry_points: Mapping[str, EntryPoint]) -> ctypes.CDLL:
    """A library of CUDA kernels for the devices of this machine, whatever each of them is. BuildError."""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return load_library(cuda_recipe(source, capabilities), entry_points)


def cannot_run_because(device: torch.device, load: Callable[[], ctypes.CDLL], name: str) -> str | None:
    """The reason, in one line, or None. load: of the library, whose functions NAME_usable and NAME_error say whether this driver takes it,
    and what a code means."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.version.hip is not None:
        return "this torch is built for AMD's GPUs (ROCm), and the kernels are CUDA"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is available"
    try:
        library = load()
    except BuildError as error:
        return str(error)
    if code := getattr(library, f"{name}_usable")():
        return f"the kernels can't run with this driver: {getattr(library, f'{name}_error')(code).decode()} (CUDA error {code})"
    return None
