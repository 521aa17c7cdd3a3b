"""Matrix products whose inputs are computed again in the backward pass instead of being kept.

Token mixes, squared relu and gated norms are cheap to compute and as large as the activations that matter: of the 30 x D
numbers per token and layer that autograd would keep for an RWKV-5 block, making them twice leaves 12.5.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Preparation(Protocol):
    """What stands before one or more products, with a gradient of its own."""

    def make(self, *inputs: Any) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
        """Prepared rows [S, n_in], one for each layer that takes them, and whatever else follows from the inputs."""

    def gradients(
        self, inputs: Sequence[Tensor | None], g_prepared: Sequence[Tensor | None], g_others: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Of the inputs, from those of both results of `make`."""


class Cast:
    """What has a `weight` that is used in the compute dtype: a copy in it is kept from one optimizer step to the next."""

    weight: Any
    # Where memory matters more than time, each product makes a copy of its own.
    keeps_cast = True
    _cast: Tensor | None = None
    _cast_of: tuple[Any, ...] = ()
    # Keeps the memory that _cast_of names from being given to another tensor.
    _alias: Tensor | None = None
    # The copy as autograd knows it, while a block computes.
    _in_use: Tensor | None = None

    def cast(self, dtype: torch.dtype) -> Tensor | None:
        """The weight in this dtype; None where it has it already, or where nothing is kept."""
        # A wider copy, as the check of the reference asks for, would take twice what the frozen weight takes, for good. ZeRO-3 has a
        # weight for the time of a block only.
        if self.weight.dtype.itemsize <= dtype.itemsize or not self.keeps_cast or hasattr(self.weight, "ds_id"):
            return None
        if self._cast_of != self._now(dtype):
            alias = self.weight.detach()
            self._cast, self._cast_of, self._alias = alias.to(dtype), self._now(dtype), alias
        return self._cast

    def _now(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """What tells the weight's values from earlier ones."""
        return self.weight.data_ptr(), self.weight._version, dtype


class Matrix(Cast):
    """A parameter [n_in, n_out] of a module, as RWKV's low-rank parts are, in a layer's place."""

    def __init__(self, module: nn.Module, name: str) -> None:
        # Weakly: in a cycle, a model's memory would wait for Python's garbage collector.
        self._module, self.name = weakref.ref(module), name

    def __deepcopy__(self, memo: dict[int, Any]) -> "Matrix":
        return Matrix(memo.get(id(self.module), self.module), self.name)

    @property
    def module(self) -> nn.Module:
        """Whose parameter it is."""
        module = self._module()
        assert module is not None
        return module

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parameter, whatever tensor stands for it now."""
        return getattr(self.module, self.name)

    def factors(self) -> tuple[Tensor | None, ...]:
        """As Linear's."""
        return ((self.weight if self._in_use is None else self._in_use).T,)

    def combine(self, product: Tensor) -> Tensor:
        """As Linear's."""
        return product


def casts_in(module: nn.Module) -> Iterator[Cast]:
    """Every Cast in a module, and what is one of its parameters: those that it keeps by name in `matrices`."""
    for one in module.modules():
        if isinstance(one, Cast):
            yield one
        yield from getattr(one, "matrices", {}).values()


def refresh_casts(model: nn.Module) -> None:
    """Brings the copies that are kept up to date after their weights have changed, all of them in one call."""
    found = [(one, one._cast) for one in casts_in(model) if one._cast is not None and one.weight.requires_grad]
    if found:
        torch._foreach_copy_([cast for _, cast in found], [one.weight.detach() for one, _ in found])
    for one, cast in found:
        one._cast_of = one._now(cast.dtype)


@contextmanager
def casting(casts: Sequence[Cast], dtype: torch.dtype) -> Iterator[None]:
    """Within, these use their copies in dtype; gradients return to the weights in one cast, when the last of them is there."""
    found = [(one, copy) for one in casts if (copy := one.cast(dtype)) is not None]
    if found:
        in_use = _Copies.apply([copy for _, copy in found], *(one.weight for one, _ in found))
        for (one, _), copy in zip(found, in_use, strict=True):
            one.__dict__["_in_use"] = copy  # past nn.Module's own way of setting, which takes longer than the copy
    try:
        yield
    finally:
        for one, _ in found:
            one.__dict__["_in_use"] = None


class _Copies(torch.autograd.Function):
    """Copies stand for their weights."""

    @staticmethod
    def forward(ctx, copies, *weights):
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        found = [None if grad is None else torch.empty_like(grad, dtype=dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
        torch._foreach_copy_([wide for wide in found if wide is not None], [grad for grad in grads if grad is not None])
        return None, *found


class Linear(nn.Linear, Cast):  # type: ignore[misc]  # both say that they have a weight
    """prepared @ weight.T in the dtype of the prepared rows."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        """Leaves the weight unset: a checkpoint or init.py sets it."""

    def factors(self) -> tuple[Tensor | None, ...]:
        """Matrices [n, n_in] that the prepared rows are multiplied with; None stands for the rows themselves."""
        return (self.weight if self._in_use is None else self._in_use,)

    def combine(self, product: Tensor) -> Tensor:
        """The layer's output, from one product for each of its factors."""
        return product

    def forward(self, x: Tensor) -> Tensor:
        """Rows [S, n_in], which are kept for the backward pass; [S, n_out]."""
        return products(GIVEN, (x,), [self])[0][0]


class Given:
    """Nothing to prepare."""

    def make(self, *inputs: Any) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
        """See Preparation."""
        return inputs, ()

    def gradients(self, inputs: Sequence[Tensor | None], g_prepared: Sequence[Tensor | None], g_others: Any) -> Sequence[Tensor | None]:
        """See Preparation."""
        return g_prepared


GIVEN = Given()


def products(
    preparation: Preparation, inputs: Sequence[Tensor | None], layers: Sequence[Any]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The outputs of layers (of Linear's calls), the i-th of what `preparation` makes of the inputs for it, and whatever else it makes.
    The inputs alone are kept for the backward pass. inputs[0] has the compute dtype."""
    factors = [layer.factors() for layer in layers]
    places = [place for place, own in enumerate(factors) for _ in own]
    found = iter(_Products.apply(preparation, places, len(inputs), *inputs, *(factor for own in factors for factor in own)))
    outputs = [layer.combine(*islice(found, len(own))) for layer, own in zip(layers, factors, strict=True)]
    return outputs, tuple(found)


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, preparation, places, n_inputs, *tensors):
        prepared, others = preparation.make(*tensors[:n_inputs])
        ctx.preparation, ctx.places, ctx.n_inputs = preparation, places, n_inputs
        # Of a weight in another dtype, itself: copies of all layers would wait together for the backward pass. So does a matrix in fewer
        # bits (quantized.py), which is no tensor and doesn't train.
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in tensors))
        ctx.quantized = [None if isinstance(x, Tensor) else x for x in tensors]
        ctx.set_materialize_grads(False)
        outputs = [_times(prepared[place], weight) for place, weight in zip(places, tensors[n_inputs:], strict=True)]
        return *outputs, *others

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        places, n_inputs, needed = ctx.places, ctx.n_inputs, ctx.needs_input_grad[3:]
        saved = [tensor if matrix is None else matrix for tensor, matrix in zip(ctx.saved_tensors, ctx.quantized, strict=True)]
        inputs, weights = saved[:n_inputs], saved[n_inputs:]
        g_weights: list[Tensor | None] = [None] * len(places)
        if any(needed[n_inputs:]):
            prepared, _ = ctx.preparation.make(*inputs)
            for i, (place, weight) in enumerate(zip(places, weights, strict=True)):
                if needed[n_inputs + i] and grads[i] is not None:
                    g_weights[i] = _weight_gradient(grads[i], prepared[place], weight).to(weight.dtype)
            del prepared
        if not any(needed[:n_inputs]):
            return None, None, None, *(None for _ in inputs), *g_weights
        g_prepared: list[Tensor | None] = [None] * (places[-1] + 1)
        for place, weight, grad in zip(places, weights, grads, strict=False):
            if grad is not None:
                g_prepared[place] = _times_transposed(g_prepared[place], grad, weight)
        return None, None, None, *ctx.preparation.gradients(inputs, g_prepared, grads[len(places) :]), *g_weights


def _weight_gradient(grad: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
    """grad.T @ rows, laid out as the weight is, which may be a parameter's transpose: autograd would copy another layout."""
    return grad.T @ rows if weight.is_contiguous() else (rows.T @ grad).T


def _times(rows: Tensor, weight: Tensor | None) -> Tensor:
    """rows @ weight.T, or a copy of the rows."""
    return rows.clone() if weight is None else F.linear(rows, weight if weight.dtype == rows.dtype else weight.to(rows.dtype))


def _times_transposed(total: Tensor | None, grad: Tensor, weight: Tensor | None) -> Tensor:
    """total + grad @ weight, or + grad."""
    if weight is None:
        return grad if total is None else total + grad
    matrix = weight if weight.dtype == grad.dtype else weight.to(grad.dtype)
    return grad @ matrix if total is None else total.addmm_(grad, matrix)
