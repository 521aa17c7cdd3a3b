"""Products whose inputs are prepared: gradients, what they leave for the backward pass, and copies of weights in the compute dtype."""

import pytest
import torch
import torch.nn.functional as F
from rwkv_dpo.kernels.linear_logprobs import linear_logprobs
from rwkv_dpo.model.linear import Linear, casting, products, refresh_casts


class Tanh:
    """Two prepared tensors of one input, and a third result."""

    def make(self, x):
        return (torch.tanh(x), torch.tanh(2 * x)), (x.sum(0),)

    def gradients(self, inputs, g_prepared, g_others):
        (x,) = inputs
        terms = [g * slope * (1 - torch.tanh(slope * x) ** 2) for slope, g in zip((1, 2), g_prepared, strict=False) if g is not None]
        others = [g.expand_as(x) for g in g_others if g is not None]
        return (sum([*terms, *others]),)


class Rows(Linear):
    """A layer that wants its rows besides."""

    def factors(self):
        return (*super().factors(), None)

    def combine(self, product, rows):
        return product + rows[:, :1]


def layers(*widths, kind=Linear, dtype=torch.float32):
    torch.manual_seed(0)
    made = [kind(64, width).to(dtype) for width in widths]
    for layer in made:
        torch.nn.init.normal_(layer.weight)
    return made


def kept_beside(own, action) -> list[tuple[int, ...]]:
    """Shapes of the tensors that autograd keeps while `action` runs, but for those in `own`."""
    kept = []
    pointers = {x.data_ptr() for x in own}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        result = action()
    assert result.requires_grad
    return [tuple(x.shape) for x in kept if x.data_ptr() not in pointers]


@pytest.mark.parametrize("keeps_cast", [False, True])
def test_nothing_but_the_inputs_waits_for_the_backward_pass(keeps_cast):
    (layer,) = layers(128)
    layer.keeps_cast = keeps_cast
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    cast = layer.cast(torch.bfloat16)
    assert (cast is not None) == keeps_cast
    own = [layer.weight, x, *([cast] if keeps_cast else [])]
    with casting([layer], x.dtype):
        assert kept_beside(own, lambda: products(Tanh(), (x,), [layer])[0][0]) == []
    targets = torch.tensor([0, 1, 2])
    assert (128, 64) not in kept_beside(own, lambda: linear_logprobs(x, layer.weight, targets, cast=cast).logps)


@pytest.mark.parametrize("keeps_cast", [False, True])
def test_bf16_gradients_are_bit_by_bit_those_of_the_plain_product(keeps_cast):
    first, second = layers(128, 32)
    first.keeps_cast = second.keeps_cast = keeps_cast
    x = torch.randn(30, 64, dtype=torch.bfloat16, requires_grad=True)
    with casting([first, second], x.dtype):
        outputs, _ = products(Tanh(), (x,), [first, second])
    grads = [torch.randn_like(output) for output in outputs]
    got = torch.autograd.grad(outputs, (first.weight, second.weight), grads)
    plain = [F.linear(torch.tanh(slope * x), layer.weight.bfloat16()) for slope, layer in ((1, first), (2, second))]
    want = torch.autograd.grad(plain, (first.weight, second.weight), grads)
    assert all(g.dtype == torch.float32 for g in got)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("used", [{0}, {1}, {2}, {0, 1, 2}])
def test_every_output_has_its_gradient(used):
    """Outputs that nothing is asked of, layers that are frozen, rows that a layer wants besides."""
    (first,), (second,) = layers(8, dtype=torch.float64), layers(5, kind=Rows, dtype=torch.float64)
    second.weight.requires_grad_(False)
    x = torch.randn(7, 64, dtype=torch.float64, requires_grad=True)

    def ours():
        (a, b), (c,) = products(Tanh(), (x,), [first, second])
        return a, b, c

    def plain():
        wide = torch.tanh(2 * x)
        return F.linear(torch.tanh(x), first.weight), F.linear(wide, second.weight) + wide[:, :1], x.sum(0)

    found = []
    for run in (ours, plain):
        loss = sum(output.sin().sum() for i, output in enumerate(run()) if i in used)
        found.append([*run(), *torch.autograd.grad(loss, (x, first.weight), materialize_grads=True)])
    assert all(torch.allclose(g, w, rtol=1e-12, atol=1e-12) for g, w in zip(*found, strict=True))


def test_a_copy_in_the_compute_dtype_follows_its_weight():
    (layer,) = layers(128)
    copy = layer.cast(torch.bfloat16)
    assert layer.cast(torch.bfloat16) is copy
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer.cast(torch.bfloat16), layer.weight.bfloat16())
    # As DeepSpeed writes, which nothing sees.
    layer.weight.data.mul_(2)
    refresh_casts(layer)
    assert torch.equal(layer.cast(torch.bfloat16), layer.weight.bfloat16())
    layer.weight.data = torch.randn(128, 64)
    assert torch.equal(layer.cast(torch.bfloat16), layer.weight.bfloat16())


def test_a_weight_that_has_the_compute_dtype_is_not_copied():
    (layer,) = layers(128)
    assert layer.cast(torch.float32) is None
    assert layer.bfloat16().cast(torch.bfloat16) is None


def test_no_wider_copy_of_a_frozen_weight_stays_behind():
    # The check of the reference computes in fp32, once; the copies would have stayed for the run.
    (layer,) = layers(128)
    assert layer.bfloat16().cast(torch.float32) is None
