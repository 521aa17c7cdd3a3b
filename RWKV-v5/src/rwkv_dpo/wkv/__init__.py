"""WKV-5, the recurrence at the heart of RWKV-5: its contract, and the choice among its implementations.

Legend, as in the Eagle paper (arXiv:2404.05892): r receptance, k key, v value, u bonus of the current token (time_faaaa),
w = exp(-exp(time_decay)) the decay, S[i, j] the state of one head (key index i, value index j).

    y_t[j] = sum_i r_t[i] * (S[i, j] + u[i] * k_t[i] * v_t[j])
    S[i, j] <- w[i] * S[i, j] + k_t[i] * v_t[j]

Every backend module offers two functions:

    wkv5(r, k, v, time_decay, u, cu_seqlens, state0=None) -> (y, state_end)
        r, k, v      [S, H, N] fp32, bf16 or fp16 (reference and chunked also float64), contiguous
        time_decay   [H, N] and u [H, N], any float dtype; used in fp32
        cu_seqlens   int32 [n + 1] on the CPU (layout, not data): sequence s holds rows cu_seqlens[s]:cu_seqlens[s + 1]
                     of r, k and v; a sequence may be empty
        state0       [n, H, N, N] fp32 (float64 for float64 inputs), or None for zeros
        y            [S, H, N] in the dtype of r
        state_end    [n, H, N, N] in the dtype of state0; an empty sequence hands its state0 on

    Differentiable in r, k, v, time_decay, u and state0, through y and state_end alike. N is a multiple of 8 up to 128.

    unusable_because(device) -> str | None
        None when the backend can run on that device here, else the reason: one line, and after it the compiler's log if a
        build failed. May compile on first use.
"""

import importlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from rwkv_dpo.errors import InputError

log = logging.getLogger(__name__)

WKV5 = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# Fastest first: the order in which `auto` tries them.
BACKENDS = ("cuda", "cpu", "chunked", "reference")


class Backend(NamedTuple):
    name: str
    wkv5: WKV5


def choose_backend(name: str, device: torch.device) -> Backend:
    """The backend of a run. `auto` takes the first usable one and logs why the others were passed over; a backend that
    the user names is used, or refused with the whole reason (InputError)."""
    if name != "auto":
        if name not in BACKENDS:
            raise InputError(f"--wkv_backend {name}: accepted are auto, {', '.join(BACKENDS)}")
        reason = _module(name).unusable_because(device)
        if reason is not None:
            raise InputError(f"--wkv_backend {name} can't be used on {device.type}: {reason}")
        return Backend(name, _module(name).wkv5)
    passed_over: list[str] = []
    for candidate in BACKENDS:
        reason = _module(candidate).unusable_because(device)
        if reason is None:
            log.info("WKV backend: %s%s", candidate, "".join(f"; not {p}" for p in passed_over))
            return Backend(candidate, _module(candidate).wkv5)
        passed_over.append(f"{candidate} ({reason.splitlines()[0]})")
    raise AssertionError("the reference backend runs everywhere")


def _module(name: str):
    return importlib.import_module(f"{__name__}.{name}")
