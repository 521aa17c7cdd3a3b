"""The compiled functions of a block beside torch's own, on inputs small enough to be compared before their first use."""

import functools
from typing import Any

import torch
from torch import Tensor

from rwkv_dpo.kernels.agreement import Compare
from rwkv_dpo.kernels.fused import plain

# Of two roots of 5 and 3 rows, and a child of the first with 4: each row's predecessor, roots beyond the rows, and the segments' last rows.
_BEFORE, _LAST, _N_ROOTS = (12, 0, 1, 2, 3, 13, 5, 6, 4, 8, 9, 10), (4, 7, 11), 2
_HEADS, _HEAD_SIZE, _MIXES, _TOKEN_MIXES, _EPS = 2, 64, 4, 5, 1e-5


def comparison(functions: Any, device: torch.device) -> Compare:
    """Values and gradients of `functions` on a device and of `plain` in float64 on the CPU, from the same random inputs."""

    def compare(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        found, expected = _results(functions, dtype, device), exact()
        return {name: (found[name], expected[name]) for name in expected}

    exact = functools.cache(lambda: _results(plain, torch.float64, torch.device("cpu")))
    return compare


def _results(functions: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    n_rows, width = len(_BEFORE), _HEADS * _HEAD_SIZE

    def rows(*shape: int) -> Tensor:
        # Exact in 16 bits of either kind, so that one twin serves all.
        return torch.randn(shape, generator=random).bfloat16().half().to(device, dtype)

    def parameter() -> Tensor:
        return torch.rand(width, generator=random).to(device, torch.promote_types(dtype, torch.float32))

    links, mixing = _links(device), [parameter() for _ in range(_MIXES)]
    entry = (links, rows(n_rows, width), rows(_N_ROOTS, width), parameter(), parameter(), mixing, _EPS)
    mixed, last = functions.mixes(*entry)
    gated = (rows(n_rows, _HEADS, _HEAD_SIZE), rows(n_rows, width), parameter(), parameter(), _EPS)
    x, value, grad = rows(n_rows, width), rows(n_rows, width), rows(n_rows, width)
    delta = (rows(n_rows, width), rows(n_rows, width), parameter(), parameter(), parameter(), _HEADS)
    bonus = (gated[0], value, *(rows(n_rows, _HEADS, _HEAD_SIZE) for _ in range(3)), parameter(), parameter(), parameter(), _EPS)
    blended, log_w = (x, value, rows(n_rows, width), parameter()), functions.log_decay(x, parameter())
    past = functions.mixes(*entry, of_before=True)[0]
    tokens = (x, value, rows(_TOKEN_MIXES, n_rows, width), [parameter() for _ in range(_TOKEN_MIXES)])
    results = {
        "token_mixes": [functions.token_mixes(*tokens)],
        "gradients of token_mixes": functions.token_mixes_gradients(*tokens, [*rows(_TOKEN_MIXES, n_rows, width)]),
        "mixes of before": [past], "log_decay": [log_w],
        "gradients of mixes of before": functions.mixes_gradients(*entry, [*rows(_MIXES, n_rows, width)], None, None, of_before=True),
        "delta_keys": functions.delta_keys(*delta), "gradients of delta_keys": functions.delta_keys_gradients(*delta, x, value, grad),
        "bonus_norm": [functions.bonus_norm(*bonus)], "gradients of bonus_norm": functions.bonus_norm_gradients(*bonus, grad),
        "blend": [functions.blend(*blended)], "gradients of blend": functions.blend_gradients(*blended, grad),
        "gradients of log_decay": functions.log_decay_gradients(log_w, grad.to(log_w.dtype), dtype),
        "mixes": [mixed, last], "gradients of mixes": functions.mixes_gradients(*entry, [*rows(_MIXES, n_rows, width)], rows(3, width), x),
        "gated_norm": [functions.gated_norm(*gated)], "gradients of gated_norm": functions.gated_norm_gradients(*gated, grad),
        "relu_squared": [functions.relu_squared(x)], "gradient of relu_squared": functions.relu_squared_gradients(x, grad),
        "sigmoid_gate": [functions.sigmoid_gate(x, value)], "gradients of sigmoid_gate": functions.sigmoid_gate_gradients(x, value, grad),
    }  # fmt: skip
    return {f"{name} ({i})": result for name, some in results.items() for i, result in enumerate(some) if result is not None}


def _links(device: torch.device) -> Any:
    """Rows of rwkv_dpo.kernels.fused, which imports this module's users."""
    from rwkv_dpo.kernels.fused import Rows

    used = torch.tensor([*_BEFORE, *_LAST])
    start = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(used, minlength=len(_BEFORE) + _N_ROOTS).cumsum(0)])
    before, start, uses = (x.to(device, torch.int32) for x in (used[: len(_BEFORE)], start, used.argsort(stable=True)))
    return Rows(before, start, uses, torch.tensor(_LAST, device=device), _N_ROOTS)
