"""The chunked head against torch's own linear, log_softmax and gather."""

import pytest
import torch
from rwkv_dpo.kernels.linear_logprobs import linear_logprobs


def plain(hidden, weight, targets):
    logits = (hidden @ weight.to(hidden.dtype).T).to(torch.promote_types(hidden.dtype, torch.float32))
    return torch.log_softmax(logits, 1).gather(1, targets[:, None]).squeeze(1), logits.amax(1)


@pytest.mark.parametrize("n_columns", [53, 512])
@pytest.mark.parametrize("n_rows", [0, 1, 2, 37])
@pytest.mark.parametrize(("chunk_rows", "keep_bytes"), [(1024, 1 << 30), (5, 1 << 30), (5, 0), (5, 3 * 5 * 53 * 8)])
def test_values_and_gradients_equal_the_plain_head(n_rows, n_columns, chunk_rows, keep_bytes):
    torch.manual_seed(n_rows)
    hidden = torch.randn(n_rows, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n_columns, 12, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(n_columns, (n_rows,))
    out = linear_logprobs(hidden, weight, targets, chunk_rows=chunk_rows, keep_bytes=keep_bytes, collisions=n_columns == 53)
    if n_columns == 53:
        *out, collisions = out
        squares = torch.softmax(hidden @ weight.T, 1).square().sum(1)
        torch.testing.assert_close(collisions, squares.log(), rtol=1e-12, atol=1e-12)
        assert not collisions.requires_grad
    grads = [torch.randn_like(part) for part in out]
    expected = plain(hidden, weight, targets)
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(out, (hidden, weight), grads)
    want = torch.autograd.grad(expected, (hidden, weight), grads)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


def test_one_result_may_go_unused():
    hidden, weight = (
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(7, 4, dtype=torch.float64, requires_grad=True),
    )
    targets = torch.tensor([0, 6, 3])
    for i in (0, 1):
        got = torch.autograd.grad(linear_logprobs(hidden, weight, targets)[i].sum(), (hidden, weight))
        want = torch.autograd.grad(plain(hidden, weight, targets)[i].sum(), (hidden, weight))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


def test_bf16_rows_with_an_fp32_weight_stay_close_to_fp32():
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64), torch.randn(300, 64) / 8
    targets = torch.randint(300, (40,))
    exact, _ = plain(hidden, weight, targets)
    logps, _ = linear_logprobs(hidden.bfloat16().requires_grad_(), weight.requires_grad_(), targets)
    assert logps.dtype == torch.float32
    # A bf16 logit near 4 is rounded by up to 2**-7; hidden rows and weights add as much again.
    assert (logps - exact).abs().max() < 0.1
    logps.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_very_large_logits_do_not_overflow():
    hidden, weight = torch.full((1, 1), 1000.0), torch.tensor([[1.0], [-1.0]])
    logps, largest = linear_logprobs(hidden, weight, torch.tensor([1]))
    assert logps.item() == -2000
    assert largest.item() == 1000
