"""Matrix products whose inputs are made anew in the backward pass instead of being kept.

Token mixes, squared relu and gated norms are cheap to compute and as large as the activations that matter: of the 30 x D
numbers per token and layer that autograd would keep for an RWKV-5 block, computing them twice leaves 17, for about one per cent
more time.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Prepare = Callable[..., Tensor]


class Linear(nn.Linear):
    """prepare(*inputs) @ weight.T in the dtype of the prepared input; `prepare` runs again in the backward pass."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self) -> None:
        """Leaves the weight unset: a checkpoint or init.py sets it."""

    def forward(self, *inputs: Tensor, prepare: Prepare | None = None) -> Tensor:  # type: ignore[override]  # several inputs
        """What `product` makes of the inputs [S, ...] with this weight: [S, n_out]."""
        return product(self.weight, *inputs, prepare=prepare)


def product(weight: Tensor, *inputs: Tensor, prepare: Prepare | None) -> Tensor:
    """prepare(*inputs) @ weight.T, keeping the inputs alone for the backward pass; without `prepare`, inputs[0] @ weight.T."""
    if prepare is None:
        return F.linear(inputs[0], weight.to(inputs[0].dtype))
    return _PreparedLinear.apply(prepare, weight, *inputs)


class _PreparedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, prepare, weight, *inputs):
        prepared = prepare(*inputs)
        ctx.prepare = prepare
        # The weight itself: kept as cast, all layers' copies would wait together for the backward pass.
        ctx.save_for_backward(weight, *inputs)
        return F.linear(prepared, weight.to(prepared.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(needs) for x, needs in zip(saved, needed, strict=True)]
            prepared = ctx.prepare(*inputs)
        grad_weight = (grad.T @ prepared.detach()).to(weight.dtype) if ctx.needs_input_grad[1] else None
        wanted = [x for x in inputs if x.requires_grad]
        grads = iter(torch.autograd.grad(prepared, wanted, grad @ weight.to(grad.dtype)) if wanted else ())
        return None, grad_weight, *(next(grads) if needs else None for needs in needed)
