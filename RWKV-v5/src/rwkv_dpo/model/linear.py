"""Matrix products whose inputs are made anew in the backward pass instead of being kept.

Token mixes, squared relu and gated norms are cheap to compute and as large as the activations that matter: of the 30 x D
numbers per token and layer that autograd would keep for an RWKV-5 block, making them twice leaves 12.5.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Preparation(Protocol):
    """What stands before one or more products, with a gradient of its own."""

    def make(self, *inputs: Tensor | None) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
        """Prepared rows [S, n_in], one for each layer that takes them, and whatever else comes of the inputs."""

    def gradients(
        self, inputs: Sequence[Tensor | None], g_prepared: Sequence[Tensor | None], g_others: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Of the inputs, from those of both results of `make`."""


class Factor(NamedTuple):
    """A matrix [n_out, n_in] to multiply prepared rows with, and its copy in the compute dtype where one is kept."""

    weight: Tensor
    cast: Tensor | None


class Cast(nn.Module):
    """A module whose `weight` is used in the compute dtype: a copy in it is kept from one optimizer step to the next."""

    weight: nn.Parameter
    # Where memory matters more than time, each product makes a copy of its own.
    keeps_cast = True
    _cast: Tensor | None = None
    _cast_of: tuple[Any, ...] = ()
    # Keeps the memory that _cast_of names from being given to another tensor.
    _alias: Tensor | None = None

    def cast(self, dtype: torch.dtype) -> Tensor | None:
        """The weight in this dtype; None where it has it already, or where nothing is kept."""
        # ZeRO-3 has a weight for the time of a block only.
        if self.weight.dtype == dtype or not self.keeps_cast or hasattr(self.weight, "ds_id"):
            return None
        if self._cast_of != self._now(dtype):
            alias = self.weight.detach()
            self._cast, self._cast_of, self._alias = alias.to(dtype), self._now(dtype), alias
        return self._cast

    def _now(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """What tells the weight's values from earlier ones."""
        return self.weight.data_ptr(), self.weight._version, dtype


def refresh_casts(model: nn.Module) -> None:
    """Brings the copies that are kept up to date after their weights have changed, all of them in one call."""
    modules = [module for module in model.modules() if isinstance(module, Cast) and module._cast is not None and module.weight.requires_grad]
    if modules:
        torch._foreach_copy_([module._cast for module in modules], [module.weight.detach() for module in modules])
    for module in modules:
        module._cast_of = module._now(module._cast.dtype)


class Linear(nn.Linear, Cast):
    """prepared @ weight.T in the dtype of the prepared rows."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        """Leaves the weight unset: a checkpoint or init.py sets it."""

    def factors(self, dtype: torch.dtype) -> list[Factor | None]:
        """What the prepared rows are multiplied with; None stands for the rows themselves."""
        return [Factor(self.weight, self.cast(dtype))]

    def combine(self, product: Tensor) -> Tensor:
        """The layer's output, from one product for each of its factors."""
        return product

    def forward(self, x: Tensor) -> Tensor:
        """Rows [S, n_in], which are kept for the backward pass; [S, n_out]."""
        return products(Given(), (x,), [self])[0][0]


class Given:
    """Nothing to prepare."""

    def make(self, x: Tensor) -> tuple[Sequence[Tensor], tuple[Tensor, ...]]:
        """See Preparation."""
        return (x,), ()

    def gradients(self, inputs: Sequence[Tensor | None], g_prepared: Sequence[Tensor | None], g_others: Any) -> Sequence[Tensor | None]:
        """See Preparation."""
        return g_prepared


def products(
    preparation: Preparation, inputs: Sequence[Tensor | None], layers: Sequence[Any]
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """The outputs of layers (of Linear's calls), the i-th of what `preparation` makes of the inputs for it, and whatever else it makes.
    The inputs alone are kept for the backward pass. inputs[0] has the compute dtype."""
    assert inputs[0] is not None
    factors = [(place, factor) for place, layer in enumerate(layers) for factor in layer.factors(inputs[0].dtype)]
    weights = [None if factor is None else factor.weight for _, factor in factors]
    casts = [None if factor is None else factor.cast for _, factor in factors]
    found = _Products.apply(preparation, [place for place, _ in factors], casts, len(inputs), *inputs, *weights)
    outputs = []
    for place, layer in enumerate(layers):
        own = [output for (at, _), output in zip(factors, found, strict=False) if at == place]
        outputs.append(layer.combine(*own))
    return outputs, tuple(found[len(factors) :])


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx, preparation, places, casts, n_inputs, *tensors):
        inputs, weights = tensors[:n_inputs], tensors[n_inputs:]
        prepared, others = preparation.make(*inputs)
        ctx.preparation, ctx.places, ctx.n_inputs = preparation, places, n_inputs
        # A copy that nobody keeps would wait here for the backward pass, with those of all layers.
        ctx.save_for_backward(*tensors, *casts)
        ctx.set_materialize_grads(False)
        outputs = []
        for place, weight, cast in zip(places, weights, casts, strict=True):
            rows = prepared[place]
            outputs.append(rows.clone() if weight is None else F.linear(rows, _in(rows.dtype, weight, cast)))
        return *outputs, *others

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        places, n = ctx.places, len(ctx.places)
        saved, end = ctx.saved_tensors, ctx.n_inputs + n
        inputs, weights, casts = saved[: ctx.n_inputs], saved[ctx.n_inputs : end], saved[end:]
        learn = [i for i in range(n) if ctx.needs_input_grad[4 + ctx.n_inputs + i] and grads[i] is not None]
        g_weights: list[Tensor | None] = [None] * n
        if learn:
            prepared, _ = ctx.preparation.make(*inputs)
            for i, g in zip(learn, _weight_gradients([(grads[i], prepared[places[i]], weights[i]) for i in learn]), strict=True):
                g_weights[i] = g
            del prepared
        if not any(ctx.needs_input_grad[4 : 4 + ctx.n_inputs]):
            return None, None, None, None, *(None for _ in inputs), *g_weights
        g_prepared: list[Tensor | None] = [None] * (max(places) + 1)
        for place, weight, cast, g in zip(places, weights, casts, grads, strict=False):
            if g is not None:
                g_prepared[place] = _plus_product(g_prepared[place], g, weight, cast)
        g_inputs = ctx.preparation.gradients(inputs, g_prepared, grads[n:])
        return None, None, None, None, *g_inputs, *g_weights


def _in(dtype: torch.dtype, weight: Tensor, cast: Tensor | None) -> Tensor:
    return weight.to(dtype) if cast is None else cast


def _plus_product(total: Tensor | None, g: Tensor, weight: Tensor | None, cast: Tensor | None) -> Tensor:
    """total + g @ weight; g itself where the rows themselves were the output."""
    if weight is None:
        return g if total is None else total + g
    matrix = _in(g.dtype, weight, cast)
    return g @ matrix if total is None else total.addmm_(g, matrix)


def _weight_gradients(terms: Iterable[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """grad.T @ rows for each (grad, rows, weight), in the weight's dtype. What has to be cast to the same one is cast in one go."""
    terms = list(terms)
    n_numbers = [weight.numel() if weight.dtype != grad.dtype else 0 for grad, _, weight in terms]
    together = terms[0][0].new_empty(sum(n_numbers))
    parts = together.split(n_numbers)
    found = []
    for (grad, rows, weight), part in zip(terms, parts, strict=True):
        found.append(torch.mm(grad.T, rows, out=part.view(weight.shape)) if part.numel() else grad.T @ rows)
    if together.numel():
        wide = next(weight.dtype for (_, _, weight), n in zip(terms, n_numbers, strict=True) if n)
        for i, part in enumerate(together.to(wide).split(n_numbers)):
            if n_numbers[i]:
                found[i] = part.view(terms[i][2].shape)
    return found
