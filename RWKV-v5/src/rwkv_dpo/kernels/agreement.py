"""Whether a compiled kernel computes on this device what its plain-torch twin computes.

A build is compared once for each device and driver, before its first use, and what was found is kept beside the library. Only agreement
is kept: what failed may have failed for want of memory, and is tried again.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.kernels.cache import BuildError, cache_folder, is_sound, keep

# Relative L2 errors that rounding explains. fp32: a few hundred roundings (6e-8 each) add up like their square root, to about 3e-7; the
# rest is room for other compilers. 16 bits: one rounding of the results, of 2^-9 in bf16 and 2^-12 in fp16.
ALLOWED = {"fp32": 2e-5, "bf16": 1e-2, "fp16": 1e-3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_DRIVER = Path("/proc/driver/nvidia/version")


class Agreement(NamedTuple):
    """How far a kernel is from its twin. errors: the largest relative L2 error by dtype; fault: why it is not to be used, or None."""

    errors: dict[str, float]
    fault: str | None = None


# By dtype: each result's name, and what the kernel and the twin made of the same inputs.
Compare = Callable[[torch.dtype], dict[str, tuple[Tensor, Tensor]]]


def agreement(library: ctypes.CDLL, device: torch.device, compare: Compare, again: bool = False) -> Agreement:
    """Of a library of load_library's. again: compare although it is known."""
    key = as_json([library._name, *identity(device), *map(str, ALLOWED.items())])
    name = f"{Path(library._name).stem}-agrees-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    with contextlib.suppress(BuildError):
        path = cache_folder() / name
        if not again and is_sound(path):
            return Agreement(json.loads(path.read_text())["errors"])
        found = compared(compare)
        if found.fault is None:
            keep(as_json({"device": identity(device), "errors": found.errors}).encode(), path)
        return found
    return compared(compare)


def compared(compare: Compare) -> Agreement:
    """Runs a comparison in every dtype."""
    errors: dict[str, float] = {}
    for dtype, allowed in ALLOWED.items():
        try:
            with torch.inference_mode(False), torch.enable_grad():
                pairs = compare(DTYPES[dtype])
            by_result = {name: _error(found, expected) for name, (found, expected) in pairs.items()}
        except RuntimeError as error:
            return Agreement(errors, f"its first use here failed, in {dtype}: {' '.join(str(error).split())[:300]}")
        # NaN is larger than anything.
        worst = max(by_result, key=lambda name: (by_result[name] != by_result[name], by_result[name]))
        errors[dtype] = by_result[worst]
        if not errors[dtype] <= allowed:
            return Agreement(
                errors, f"its {worst} in {dtype} is {errors[dtype]:.1e} (relative) off plain PyTorch's on this device, where rounding "
                        f"explains {allowed:.0e}",
            )  # fmt: skip
    return Agreement(errors)


def _error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def identity(device: torch.device) -> list[str]:
    """What tells devices apart, and what else on this machine decides a kernel's results."""
    if device.type != "cuda":
        return [device.type, torch.__version__]
    of = torch.cuda.get_device_properties(device)
    return [of.name, f"sm_{of.major}{of.minor}", str(getattr(of, "uuid", "")), driver_version(), torch.__version__]


@functools.cache
def driver_version() -> str:
    """Of NVIDIA's driver, as 580.65.06; "" where there is none. Windows, and Linux within it, have nvidia-smi alone to ask."""
    with contextlib.suppress(OSError):
        if found := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER.read_text()):
            return found[1]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", check=False, timeout=20)
        return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""
    return ""
