"""Tensors that autograd would keep, made again in the backward pass: once, for all who need them, and bit by bit the same."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _MadeAgain:
    """Stands for one of the tensors in every place that would have kept it."""

    def __init__(self, make: Callable[[], Sequence[Tensor]]) -> None:
        self._make = make
        self._made: Sequence[Tensor] | None = None
        self.n_places = 0
        self._n_left = 0

    def take(self, number: int) -> Tensor:
        """The last place that asks lets go of them."""
        if self._made is None:
            with torch.no_grad():
                self._made, self._n_left = self._make(), self.n_places
        self._n_left -= 1
        tensor = self._made[number]
        if not self._n_left:
            self._made = None
        return tensor


def forgetting(made: Sequence[Tensor], make: Callable[[], Sequence[Tensor]]) -> saved_tensors_hooks:
    """A context: what is computed within keeps none of the tensors `made` for its backward pass, which calls make() for them.
    make must give the same values in the same order, whatever has been computed since."""
    again = _MadeAgain(make)
    # Addresses, not tensors: a reference would keep what is to be forgotten. They are unique while the tensors are in use.
    known = [(tensor.data_ptr(), tensor.shape) for tensor in made]

    def keep(x: Tensor) -> Tensor | int:
        key = (x.data_ptr(), x.shape)
        if key not in known:
            return x
        again.n_places += 1
        return known.index(key)

    def give(kept: Tensor | int) -> Tensor:
        return again.take(kept) if isinstance(kept, int) else kept

    return saved_tensors_hooks(keep, give)
