"""Preparations and layers for `linear.products` that need no kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Sequence[Tensor]]


class Again:
    """A Preparation of a function(*inputs) -> prepared rows, which autograd runs again in the backward pass."""

    def __init__(self, function: Function) -> None:
        self.function = function

    def make(self, *inputs: Tensor | None) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
        """See Preparation."""
        return self.function(*inputs), ()

    def gradients(
        self, inputs: Sequence[Tensor | None], g_prepared: Sequence[Tensor | None], g_others: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """See Preparation."""
        with torch.enable_grad():
            leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
            made = self.function(*leaves)
        given = [(output, grad) for output, grad in zip(made, g_prepared, strict=False) if grad is not None]
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad([x for x, _ in given], wanted, [grad for _, grad in given], allow_unused=True))
        return [None if leaf is None else next(found) for leaf in leaves]


class Rows:
    """In a layer's place: the prepared rows themselves."""

    def factors(self) -> tuple[Tensor | None, ...]:
        """As Linear's."""
        return (None,)

    def combine(self, product: Tensor) -> Tensor:
        """As Linear's."""
        return product


class Both:
    """Two layers of the same rows; the output is a pair."""

    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second
        self._n_first = 0

    def factors(self) -> tuple[Tensor | None, ...]:
        """As Linear's."""
        first = self.first.factors()
        self._n_first = len(first)
        return (*first, *self.second.factors())

    def combine(self, *products: Tensor) -> tuple[Tensor, Tensor]:
        """As Linear's."""
        return self.first.combine(*products[: self._n_first]), self.second.combine(*products[self._n_first :])
