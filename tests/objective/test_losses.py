"""How losses of corpus and pairs are one, by hand."""


import torch
from rwkv_dpo.objective.losses import l2wrap, mix


def test_l2wrap_leaves_the_value_and_scales_with_the_incoming_gradient():
    largest = torch.tensor([4.0, -2.0], requires_grad=True)
    loss = torch.tensor(3.0, requires_grad=True)
    out = 0.25 * l2wrap(loss, largest)
    out.backward()
    assert out.item() == 0.75
    torch.testing.assert_close(largest.grad, 0.25 * 1e-4 / 2 * largest.detach())


def test_a_part_of_weight_zero_is_left_out_even_when_it_is_nan():
    nan, one = torch.tensor(float("nan")), torch.tensor(1.0)
    assert mix(nan, one, 0.0) == 1
    assert mix(one, nan, 1.0) == 1
    assert mix(torch.tensor(2.0), torch.tensor(4.0), 0.25) == 3.5
