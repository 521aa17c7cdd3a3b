"""What stands in a layer's place among those of `linear.products`: no product at all, or two."""

from typing import Any

from torch import Tensor


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
