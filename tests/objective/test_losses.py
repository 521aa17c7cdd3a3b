"""Losses against values derived by hand."""

import math

import torch
from rwkv_dpo.objective.losses import dpo_loss, l2wrap, mix


def test_dpo_loss_of_a_policy_that_is_the_reference_is_log_2():
    logps = torch.tensor([[-30.0, -40.0], [-5.0, -1.0]])
    terms = dpo_loss(logps, logps, beta=0.5)
    torch.testing.assert_close(terms.losses, torch.full((2,), math.log(2)))
    assert not terms.chosen_rewards.any()


def test_dpo_loss_by_hand():
    # margin = 0.1 * ((-10 + 12) - (-20 + 15)) = 0.7, loss = log(1 + exp(-0.7))
    terms = dpo_loss(torch.tensor([[-10.0, -20.0]]), torch.tensor([[-12.0, -15.0]]), beta=0.1)
    torch.testing.assert_close(terms.losses, torch.tensor([math.log1p(math.exp(-0.7))]))
    torch.testing.assert_close(terms.chosen_rewards, torch.tensor([0.2]))
    torch.testing.assert_close(terms.rejected_rewards, torch.tensor([-0.5]))


def test_a_huge_margin_gives_a_finite_loss_and_gradient():
    logps = torch.tensor([[-1e6, 0.0]], requires_grad=True)
    loss = dpo_loss(logps, torch.zeros(1, 2), beta=1.0).losses.sum()
    loss.backward()
    assert loss.item() == 1e6
    assert logps.grad.tolist() == [[-1, 1]]


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
