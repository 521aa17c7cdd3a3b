"""bf16 moments with stochastic rounding: unbiased, reproducible, and as good as fp32 ones where rounding to nearest is not."""

import copy

import pytest
import torch
from rwkv_dpo.optimizer import adamw_bf16
from rwkv_dpo.optimizer.adamw_bf16 import AdamWBF16, random_int16, round_into

SETTINGS = {"lr": 2e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}


def round_to_nearest(target, values, bits):
    target.copy_(values)


def rounded(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    round_into(target, values.clone(), random_int16(values.numel(), torch.Generator().manual_seed(seed)))
    return target


@pytest.mark.parametrize("value", [1 + 1 / 1024, -1 - 1 / 300, 3.3e-5, -7.7e12, 1e-39, 255.9])
def test_a_number_becomes_one_of_its_two_neighbours_and_itself_on_average(value):
    n = 200_000
    got = rounded(torch.full((n,), value)).double()
    neighbours = got.unique()
    exact = float(torch.tensor(value))
    assert len(neighbours) == 2
    assert neighbours[0] < exact < neighbours[1]
    gap = float(neighbours[1] - neighbours[0])
    assert gap <= max(abs(exact) / 128, 2**-133)
    # The mean of n such draws has a standard deviation of at most gap / 2 / sqrt(n).
    assert abs(float(got.mean()) - exact) < 4 * gap / 2 / n**0.5


def test_what_bf16_can_hold_stays_as_it_is():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 1e30, float("inf"), -float("inf")]).bfloat16().float()
    for seed in range(20):
        assert torch.equal(rounded(values, seed).float(), values)
    assert rounded(torch.tensor([float("nan")])).isnan().all()


def test_random_bits_cover_all_of_int16_evenly():
    counts = torch.bincount(random_int16(1 << 22, torch.Generator().manual_seed(0)).int() + (1 << 15), minlength=1 << 16).double()
    # Chi-square of 65,535 degrees of freedom: within five standard deviations of its mean.
    chi_square = float(((counts - 64) ** 2 / 64).sum())
    assert abs(chi_square - 65535) < 5 * (2 * 65535) ** 0.5


def run(make, gradients, n=1000):
    """The optimizer after it has taken `gradients` (one number a step, alike for all of n weights)."""
    weight = torch.nn.Parameter(torch.zeros(n))
    optimizer = make([weight])
    for gradient in gradients:
        weight.grad = torch.full((n,), float(gradient))
        optimizer.step()
    return weight.detach(), optimizer.state[weight]


def test_moments_follow_fp32_ones_where_rounding_to_nearest_stops_short(monkeypatch):
    """A steady gradient of 1: exp_avg_sq rises towards 1 by a hundredth of what is left."""
    _, exact = run(lambda p: torch.optim.AdamW(p, **SETTINGS), [1] * 600)
    _, ours = run(lambda p: AdamWBF16(p, **SETTINGS), [1] * 600)
    assert ours["exp_avg_sq"].dtype == ours["exp_avg"].dtype == torch.bfloat16
    assert ours["exp_avg_sq"].float().mean() == pytest.approx(float(exact["exp_avg_sq"].mean()), rel=0.003)
    assert ours["exp_avg"].float().mean() == pytest.approx(float(exact["exp_avg"].mean()), rel=0.003)
    monkeypatch.setattr(adamw_bf16, "round_into", round_to_nearest)
    _, nearest = run(lambda p: AdamWBF16(p, **SETTINGS), [1] * 600)
    assert nearest["exp_avg_sq"].float().mean() < 0.85 * exact["exp_avg_sq"].mean()


def least_squares(make, n_steps=1500):
    """Loss after minibatch steps on x @ weight = y, the first five with gradients 30 times too large, as runs may begin."""
    generator = torch.Generator().manual_seed(0)
    x, truth = torch.randn(2048, 64, generator=generator), torch.randn(64, 16, generator=generator)
    y = x @ truth + 0.1 * torch.randn(2048, 16, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(64, 16))
    optimizer = make([weight])
    for step in range(n_steps):
        rows = torch.randint(2048, (64,), generator=generator)
        scale = 30.0 if step < 5 else 1.0
        loss = scale * (x[rows] @ weight - y[rows]).square().mean()
        (weight.grad,) = torch.autograd.grad(loss, [weight])
        optimizer.step()
    return float((x @ weight.detach() - y).square().mean())


@pytest.mark.parametrize("beta2", [0.99, 0.999])
def test_least_squares_converge_as_with_fp32_moments(beta2):
    settings = {**SETTINGS, "betas": (0.9, beta2)}
    exact, ours = least_squares(lambda p: torch.optim.AdamW(p, **settings)), least_squares(lambda p: AdamWBF16(p, **settings))
    assert ours == pytest.approx(exact, rel=0.03)


def test_without_stochastic_rounding_least_squares_do_not_converge(monkeypatch):
    """beta2 = 0.999: a mean that large gradients have raised does not fall again, and steps stay small."""
    settings = {**SETTINGS, "betas": (0.9, 0.999)}
    exact = least_squares(lambda p: torch.optim.AdamW(p, **settings))
    monkeypatch.setattr(adamw_bf16, "round_into", round_to_nearest)
    assert least_squares(lambda p: AdamWBF16(p, **settings)) > 2 * exact


def trained(optimizer, weights, n):
    generator = torch.Generator().manual_seed(5)
    for _ in range(n):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step()


def weights_of(*shapes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    results = []
    for seed in (1, 1, 2):
        weights = weights_of((7, 5))
        optimizer = AdamWBF16(weights, **SETTINGS, seed=seed)
        trained(optimizer, weights, 3)
        results.append(optimizer.state[weights[0]]["exp_avg_sq"])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_equal_parameters_in_other_places_round_differently():
    weights = weights_of((50,), (50,))
    optimizer = AdamWBF16(weights, **SETTINGS)
    for weight in weights:
        weight.grad = torch.full((50,), 0.1)
    optimizer.step()
    assert not torch.equal(*(optimizer.state[weight]["exp_avg"] for weight in weights))


def test_a_saved_state_goes_on_as_if_never_stopped():
    def gradients(weights, step):
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)

    settings = {name: value for name, value in SETTINGS.items() if name != "weight_decay"}
    whole = weights_of((9, 11), (3,))
    optimizer = AdamWBF16([{"params": whole[:1], "weight_decay": 0.1}, {"params": whole[1:]}], **settings, seed=4)
    for step in range(6):
        if step == 3:
            saved, values = copy.deepcopy(optimizer.state_dict()), [w.detach().clone() for w in whole]
            again = [torch.nn.Parameter(w) for w in values]
            resumed = AdamWBF16([{"params": again[:1], "weight_decay": 0.1}, {"params": again[1:]}], **settings, seed=4)
            resumed.load_state_dict(saved)
            assert {s["exp_avg"].dtype for s in resumed.state.values()} == {torch.bfloat16}
        gradients(whole, step)
        optimizer.step()
        if step >= 3:
            gradients(again, step)
            resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_one_step_is_adamws_and_chunks_do_not_show(monkeypatch):
    """The first update comes from moments that were not yet rounded: exactly fp32's, in any number of chunks, weight decay included."""
    monkeypatch.setattr(adamw_bf16, "CPU_CHUNK", 8)
    for dtype in (torch.float32, torch.float64):
        ours, theirs = weights_of((5, 7), dtype=dtype), weights_of((5, 7), dtype=dtype)
        trained(AdamWBF16(ours, **SETTINGS | {"weight_decay": 0.1}), ours, 1)
        trained(torch.optim.AdamW(theirs, **SETTINGS | {"weight_decay": 0.1}), theirs, 1)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)


def test_parameters_without_a_gradient_stay_and_a_closure_is_called():
    weights = weights_of((3,), (3,))
    optimizer = AdamWBF16(weights, **SETTINGS)

    def closure():
        weights[0].grad = torch.ones(3)
        return 5.0

    assert optimizer.step(closure) == 5.0
    assert torch.equal(weights[1], torch.ones(3))
    assert not torch.equal(weights[0], torch.ones(3))


def test_temporaries_stay_within_a_chunk():
    """By torch's own count: of 40 MB of weights, no tensor larger than a few chunks is made in a step."""
    weights = weights_of((10_000_000,))
    optimizer = AdamWBF16(weights, **SETTINGS)
    weights[0].grad = torch.ones(10_000_000)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    sizes = [event.nbytes() for event in _allocations(profile)]
    assert max(sizes) <= 4 * adamw_bf16.CPU_CHUNK
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    assert peak <= 12 * 4 * adamw_bf16.CPU_CHUNK


def _allocations(profile):
    return [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu_moments_follow_fp32_ones_and_repeat():
    def train(make):
        generator = torch.Generator().manual_seed(3)
        weights = [torch.nn.Parameter(torch.ones(shape, device="cuda")) for shape in ((3000, 2000), (5,))]
        optimizer = make(weights)
        for _ in range(30):
            for weight in weights:
                weight.grad = (1 + torch.randn(weight.shape, generator=generator)).cuda()
            optimizer.step()
        return optimizer.state[weights[0]], weights[0].detach()

    (exact, weight), (state, ours), (again, _) = (
        train(lambda p: torch.optim.AdamW(p, **SETTINGS)),
        train(lambda p: AdamWBF16(p, **SETTINGS)),
        train(lambda p: AdamWBF16(p, **SETTINGS)),
    )
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name], again[name])
        assert state[name].float().mean().item() == pytest.approx(exact[name].mean().item(), rel=1e-3)
    assert (ours - weight).abs().mean() < 0.02 * (weight - 1).abs().mean()
