"""RWKV-6's and RWKV-7's own functions of a block by a compiled library."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_dpo.kernels.fused.compiled import CommonFunctions, RowsCall, dense, parameter, pointers, where
from rwkv_dpo.kernels.fused.plain import LEAST_LENGTH


class Functions(CommonFunctions):
    """All of rwkv_dpo.kernels.fused, by name, by one library."""

    def token_mixes(self, own: Tensor, before: Tensor, adds: Tensor, mixing: Sequence[Tensor]) -> Tensor:
        """See rwkv_dpo.kernels.fused."""
        (own, before), adds, mixing = _rows(own, before), adds.contiguous(), _parameters(own, *mixing)
        mixed = torch.empty_like(adds)
        self._run("token_mixes_forward", self._mixes(own, adds, mixing), own, before, adds, pointers(mixing), mixed)
        return mixed

    def token_mixes_gradients(
        self, own: Tensor, before: Tensor, adds: Tensor, mixing: Sequence[Tensor], g_mixed: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """See rwkv_dpo.kernels.fused: of own, before, adds, and of each of mixing."""
        shapes = [mix.shape for mix in mixing]
        (own, before), adds, mixing = _rows(own, before), adds.contiguous(), _parameters(own, *mixing)
        grads, found = [dense(g) for g in g_mixed], [torch.empty_like(x) for x in (own, before, adds)]
        sums, partial = self._sums(mixing[0], len(own), len(mixing) * own.shape[1])
        given = (own, before, adds, pointers(mixing), pointers(grads))
        self._run("token_mixes_backward", self._mixes(own, adds, mixing), *given, *found, partial, sums)
        return *found, *(g.view(shape) for g, shape in zip(sums.view(len(mixing), -1).unbind(), shapes, strict=True))

    def delta_keys(self, k: Tensor, a: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, n_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """See rwkv_dpo.kernels.fused."""
        given, parameters = _rows(k, a), _parameters(k, a0, k_k, k_a)
        out = [torch.empty_like(given[0]) for _ in range(3)]
        self._run("delta_keys_forward", self._heads(_heads_of(given[0], n_heads), LEAST_LENGTH), *given, *parameters, *out)
        return out[0], out[1], out[2]

    def delta_keys_gradients(
        self, k: Tensor, a: Tensor, a0: Tensor, k_k: Tensor, k_a: Tensor, n_heads: int, g_key: Tensor, g_taken: Tensor, g_put_back: Tensor
    ) -> tuple[Tensor, ...]:
        """See rwkv_dpo.kernels.fused: of k, a, a0, k_k and k_a."""
        given, parameters, grads = _rows(k, a), _parameters(k, a0, k_k, k_a), _rows(g_key, g_taken, g_put_back)
        return self._backward("delta_keys_backward", _heads_of(given[0], n_heads), LEAST_LENGTH, given, (a0, k_k, k_a), parameters, grads)

    def bonus_norm(
        self, y: Tensor, gate: Tensor, r: Tensor, k: Tensor, v: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> Tensor:
        """See rwkv_dpo.kernels.fused."""
        given = _rows(y, gate, r, k, v)
        out = torch.empty_like(given[1])
        self._run("bonus_norm_forward", self._heads(y, eps), *given, *_parameters(y, r_k, weight, bias), out)
        return out

    def bonus_norm_gradients(
        self, y: Tensor, gate: Tensor, r: Tensor, k: Tensor, v: Tensor, r_k: Tensor, weight: Tensor, bias: Tensor, eps: float, g_out: Tensor
    ) -> tuple[Tensor, ...]:
        """See rwkv_dpo.kernels.fused: of y, gate, r, k, v, r_k, weight and bias."""
        given, parameters = _rows(y, gate, r, k, v), _parameters(y, r_k, weight, bias)
        return self._backward("bonus_norm_backward", y, eps, given, (r_k, weight, bias), parameters, _rows(g_out))

    def blend(self, own: Tensor, first: Tensor, depth: Tensor, v0: Tensor) -> Tensor:
        """See rwkv_dpo.kernels.fused."""
        given = _rows(own, first, depth)
        out = torch.empty_like(given[0])
        self._run("blend_forward", self._heads(_heads_of(own), 0.0), *given, *_parameters(own, v0), out)
        return out

    def blend_gradients(self, own: Tensor, first: Tensor, depth: Tensor, v0: Tensor, g_out: Tensor) -> tuple[Tensor, ...]:
        """See rwkv_dpo.kernels.fused: of own, first, depth and v0."""
        given, parameters = _rows(own, first, depth), _parameters(own, v0)
        return self._backward("blend_backward", _heads_of(own), 0.0, given, (v0,), parameters, _rows(g_out))

    def log_decay(self, x: Tensor, w0: Tensor) -> Tensor:
        """See rwkv_dpo.kernels.fused."""
        (w0,) = _parameters(x, w0)
        log_w = torch.empty_like(x, dtype=w0.dtype, memory_format=torch.contiguous_format)
        self._run("log_decay_forward", self._heads(_heads_of(x), 0.0), x.contiguous(), w0, log_w)
        return log_w

    def log_decay_gradients(self, log_w: Tensor, g_out: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See rwkv_dpo.kernels.fused: of x and w0."""
        g_x = torch.empty_like(log_w, dtype=dtype)
        g_w0, partial = self._sums(log_w, len(log_w), log_w.shape[1])
        self._run("log_decay_backward", self._heads(_heads_of(g_x), 0.0), log_w, g_out.contiguous(), g_x, partial, g_w0)
        return g_x, g_w0

    def _mixes(self, own: Tensor, adds: Tensor, mixing: Sequence[Tensor]) -> RowsCall:
        if adds.shape != (len(mixing), *own.shape) or adds.dtype != own.dtype:
            raise ValueError(f"{len(mixing)} mixes of rows {tuple(own.shape)} beside what is added to them, {tuple(adds.shape)}")
        return RowsCall(where(own), *own.shape, 0, 0, len(mixing), self._strip)

    def _backward(
        self, function: str, heads: Tensor, eps: float, given: list[Tensor], shaped: tuple[Tensor, ...], parameters: list[Tensor],
        grads: list[Tensor],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The gradients of rows, and of parameters, each in the shape that `shaped` has."""
        found = [torch.empty_like(x) for x in given]
        width = parameters[0].numel()
        sums, partial = self._sums(parameters[0], len(heads), len(parameters) * width)
        self._run(function, self._heads(heads, eps), *given, *parameters, *grads, *found, partial, sums)
        return *found, *(g.view(p.shape) for g, p in zip(sums.view(-1, width).unbind(), shaped, strict=True))


def _rows(*tensors: Tensor) -> list[Tensor]:
    """As the library takes them. ValueError where they aren't all as many, of one type: raw pointers follow."""
    if any(x.numel() != tensors[0].numel() or x.dtype != tensors[0].dtype for x in tensors):
        raise ValueError(f"rows of unlike sizes or types: {[(tuple(x.shape), x.dtype) for x in tensors]}")
    return [x.contiguous() for x in tensors]


def _parameters(x: Tensor, *parameters: Tensor) -> list[Tensor]:
    width = x[0].numel() if len(x) else x.numel()
    if len(x) and any(p.numel() != width for p in parameters):
        raise ValueError(f"parameters of {[p.numel() for p in parameters]} numbers beside rows of {width}")
    return [parameter(p, x) for p in parameters]


def _heads_of(x: Tensor, n_heads: int = 1) -> Tensor:
    """Rows [S, C] as [S, H, N]; one head where no function tells channels apart."""
    return x.reshape(len(x), n_heads, x.shape[1] // n_heads)
