"""The choice among the implementations of a recurrence, and what the compiled ones demand of their inputs."""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_dpo.base.errors import InputError

log = logging.getLogger(__name__)

WKV = Callable[..., tuple[Tensor, Tensor]]

# Fastest first: the order in which `auto` tries them.
BACKENDS = ("cuda", "cpu", "chunked", "reference")

# By device: the backend made for it, and what its absence costs.
_MADE_FOR = {
    "cuda": ("cuda", "this run will be several times slower"),
    "cpu": ("cpu", "its part of a step will take several times as long"),
}

# The types the kernels offer, by the code they know them under.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Backend(NamedTuple):
    """An implementation of a recurrence, by its name."""

    name: str
    wkv: WKV


def choose_backend(version: str, name: str, device: torch.device) -> Backend:
    """The backend of a run of a model version ("5"). `auto` takes the first usable one, says why it skipped the others, and warns
    when that makes the run slow; a backend that the user names is used, or refused with the reason (InputError)."""
    if name != "auto":
        if name not in BACKENDS:
            raise InputError(f"--wkv_backend {name}: accepted are auto, {', '.join(BACKENDS)}")
        reason = _unusable_because(version, name, device)
        if reason is not None:
            raise InputError(f"--wkv_backend {name} can't be used on {device.type}: {reason}")
        return _backend(version, name)
    passed_over: dict[str, str] = {}
    for candidate in BACKENDS:
        reason = _unusable_because(version, candidate, device)
        if reason is None:
            _tell(candidate, passed_over, device)
            return _backend(version, candidate)
        passed_over[candidate] = reason
    raise AssertionError("the reference backend runs everywhere")


def name_of(wkv: WKV) -> str:
    """The backend that a recurrence belongs to."""
    return wkv.__module__.rpartition(".")[2]


def offers(version: str, name: str) -> bool:
    """Whether a model version has a backend of that name."""
    return importlib.util.find_spec(_module_name(version, name)) is not None


def _unusable_because(version: str, name: str, device: torch.device) -> str | None:
    if not offers(version, name):
        return f"RWKV-{version} has none"
    return importlib.import_module(_module_name(version, name)).unusable_because(device)


def _backend(version: str, name: str) -> Backend:
    return Backend(name, getattr(importlib.import_module(_module_name(version, name)), f"wkv{version}"))


def _module_name(version: str, name: str) -> str:
    return f"rwkv_dpo.kernels.wkv{version}.{name}"


def _tell(chosen: str, passed_over: dict[str, str], device: torch.device) -> None:
    made_for_it, cost = _MADE_FOR.get(device.type, ("", ""))
    if made_for_it in passed_over:
        log.warning("WKV backend: %s, and %s: not %s, since %s", chosen, cost, made_for_it, passed_over[made_for_it])
    else:
        log.info("WKV backend: %s%s", chosen, "".join(f"; not {one} ({reason})" for one, reason in passed_over.items()))


def check_inputs(
    backend: str, rows: Mapping[str, Tensor], cu_seqlens: Tensor, state0: Tensor | None, **others: Mapping[str, Tensor]
) -> None:
    """What check_types and check_layout find wrong."""
    check_types(backend, rows, **others)
    check_layout(next(iter(rows.values())), cu_seqlens, state0)


def check_types(
    backend: str, rows: Mapping[str, Tensor], *, decays: Mapping[str, Tensor] | None = None, per_head: Mapping[str, Tensor] | None = None
) -> None:
    """Checks `rows` and `decays` [S, H, N], the former of one type, and `per_head` [H, N], by their names.

    InputError for a type or head size that the kernels don't offer; ValueError for shapes that don't fit together: raw pointers
    follow, so that a wrong shape would be a wild read."""
    first = next(iter(rows.values()))
    head_size = first.shape[2]
    if any(x.dtype != first.dtype for x in rows.values()) or first.dtype not in DTYPES:
        *names, last = rows
        raise InputError(
            f"WKV backend {backend} takes {', '.join(names)} and {last} of one type among fp32, bf16 and fp16, not "
            f"{', '.join(str(x.dtype) for x in rows.values())}; float64 runs on --wkv_backend reference or chunked"
        )
    if head_size % 8 or not 8 <= head_size <= 128:
        raise InputError(f"WKV backend {backend}: head size {head_size}; accepted are multiples of 8 up to 128")
    _check_shapes(first, first.shape, {**rows, **(decays or {})})
    _check_shapes(first, first.shape[1:], per_head or {})


def check_layout(r: Tensor, cu_seqlens: Tensor, state0: Tensor | None) -> None:
    """The same of where sequences lie, and of what they begin from."""
    _, n_heads, head_size = r.shape
    if state0 is not None:
        _check_shapes(r, (cu_seqlens.numel() - 1, n_heads, head_size, head_size), {"state0": state0})
    _check_bounds(bytes_of(cu_seqlens), len(r))


def bytes_of(cu_seqlens: Tensor) -> bytes:
    """As int32: what a layout of sequences is known by."""
    return cu_seqlens.to(torch.int32).numpy().tobytes()


# Layers ask for the same ones again and again.
@lru_cache(maxsize=64)
def _check_bounds(cu_seqlens: bytes, n_tokens: int) -> None:
    bounds = torch.frombuffer(bytearray(cu_seqlens), dtype=torch.int32)
    if bounds[0] != 0 or bounds[-1] != n_tokens or (bounds.diff() < 0).any():
        raise ValueError(f"cu_seqlens {bounds.tolist()} must rise from 0 to the number of tokens, {n_tokens}")


def _check_shapes(r: Tensor, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
    for name, x in tensors.items():
        if x.shape != torch.Size(shape) or x.device != r.device:
            raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}, beside r {tuple(r.shape)} on {r.device}")
