"""Linear layers that prepare their input: gradients, and what they leave for the backward pass."""

import torch
import torch.nn.functional as F
from rwkv_dpo.kernels.linear_logprobs import linear_logprobs
from rwkv_dpo.model.linear import Linear


def kept_beside(own, action) -> list[tuple[int, ...]]:
    """Shapes of the tensors that autograd keeps while `action` runs, but for those in `own`."""
    kept = []
    pointers = {x.data_ptr() for x in own}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        result = action()
    assert result.requires_grad
    return [tuple(x.shape) for x in kept if x.data_ptr() not in pointers]


def test_no_copy_of_an_fp32_weight_waits_for_the_backward_pass():
    layer = Linear(64, 128)
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(3, 64, dtype=torch.bfloat16, requires_grad=True)
    assert kept_beside([layer.weight, x], lambda: layer(x, prepare=torch.tanh)) == []
    targets = torch.tensor([0, 1, 2])
    assert (128, 64) not in kept_beside([layer.weight, x], lambda: linear_logprobs(x, layer.weight, targets).logps)


def test_bf16_gradients_are_bit_by_bit_those_of_the_plain_product():
    torch.manual_seed(0)
    layer = Linear(64, 128)
    torch.nn.init.normal_(layer.weight)
    x, grad = torch.randn(30, 64, dtype=torch.bfloat16, requires_grad=True), torch.randn(30, 128, dtype=torch.bfloat16)
    got = torch.autograd.grad(layer(x, prepare=torch.tanh), (layer.weight, x), grad)
    want = torch.autograd.grad(F.linear(torch.tanh(x), layer.weight.bfloat16()), (layer.weight, x), grad)
    assert got[0].dtype == torch.float32
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
