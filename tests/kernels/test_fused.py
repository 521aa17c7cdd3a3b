"""The functions between a block's matrix products: compiled ones against torch's operations in float64, values and all gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.kernels.fused import Rows, cpu, implementation, plain
from torch import Tensor

# fp32: sums of a few hundred roundings. 16 bits: one rounding of each result (2^-9, 2^-12), and in mixes one of the norm before it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def _memory_full_of_nan():
    """An output left unwritten can't pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def compiled():
    if reason := cpu.unusable_because(torch.device("cpu")):
        pytest.skip(reason)
    return cpu.functions()


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """The same numbers in any dtype, which bf16 has."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).bfloat16().to(dtype)


def rows_of(lengths_and_parents: list[tuple[int, int]]) -> Rows:
    builder = ForestBuilder()
    for length, parent in lengths_and_parents:
        builder.add([1] * length, parent)
    forest, _ = builder.build()
    return Rows(forest.before, forest.uses_start, forest.uses, forest.last_rows, forest.n_roots)


# Empty segments with and without rows before them, many children of one row, strips of 64 rows that begin within a segment and at one.
FORESTS = {
    "one": [(1, -1)], "sequence": [(200, -1)], "pair": [(20, -1), (9, 0), (7, 0)],
    "odd": [(0, -1), (64, -1), (0, 1), (0, 2), (3, 3), (5, 0), (1, 1), (130, 1), (0, -1), (2, 8)],
}


def close(got, want, dtype):
    for name, (g, w) in enumerate(zip(got, want, strict=True)):
        assert (g is None) == (w is None), name
        if g is not None:
            error = float((g.double() - w).norm() / w.norm().clamp(min=1e-9))
            assert error < TOLERANCE[dtype], (name, error)


def parameter_dtype(dtype):
    return torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize("handed", [False, True])
@pytest.mark.parametrize("lacking", [(), (1,), ("last",), (0, 1, 2)])
def test_mixes(compiled, dtype, forest, handed, lacking):
    rows, n_channels = rows_of(FORESTS[forest]), 37
    n_rows, n_segments = rows.before.numel(), rows.last_rows.numel()
    exact = [random(n_rows, n_channels), random(rows.n_roots, n_channels, seed=1) if handed else None, random(n_channels, seed=2),
             random(n_channels, seed=3), [random(1, 1, n_channels, seed=4 + m) for m in range(3)]]  # fmt: skip
    grads = [None if m in lacking else random(n_rows, n_channels, seed=10 + m) for m in range(3)]
    g_last = None if "last" in lacking else random(n_segments, n_channels, seed=20)

    def to(x):
        return None if x is None else x.to(dtype)

    parameters = [p.to(parameter_dtype(dtype)) for p in (*exact[2:4], *exact[4])]
    given = (rows, to(exact[0]), to(exact[1]), *parameters[:2], parameters[2:], 1e-5)
    mixed, last = compiled.mixes(*given)
    want_mixed, want_last = plain.mixes(rows, *exact, 1e-5)
    close([*mixed, last], [*want_mixed, want_last], dtype)
    assert mixed.dtype == last.dtype == dtype
    got = compiled.mixes_gradients(*given, [to(g) for g in grads], to(g_last))
    if any(g is not None for g in (*grads, g_last)):
        close(got, plain.mixes_gradients(rows, *exact, 1e-5, grads, g_last), dtype)
    assert [g.shape for g in got if g is not None] == [x.shape for x in (given[1], given[2], *parameters) if x is not None]


def test_what_a_row_is_mixed_with_is_the_row_before_it_in_its_own_segment():
    """plain's own oracle: LayerNorm of torch, and a loop."""
    rows, x, handed = rows_of([(3, -1), (2, -1), (2, 0)]), random(7, 4), random(2, 4, seed=1)
    (mixed,), last = plain.mixes(rows, x, handed, torch.ones(4).double(), torch.zeros(4).double(), [torch.tensor([0.25] * 4)], 1e-5)
    n = F.layer_norm(x, (4,))
    before = torch.stack([handed[0], n[0], n[1], handed[1], n[3], n[2], n[5]])
    torch.testing.assert_close(mixed, 0.25 * n + 0.75 * before)
    assert torch.equal(last, n[[2, 4, 6]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_rows", "n_heads", "head_size"), [(0, 2, 8), (1, 1, 8), (131, 3, 24)])
def test_gated_norm(compiled, dtype, n_rows, n_heads, head_size):
    n_channels = n_heads * head_size
    exact = [random(n_rows, n_heads, head_size), 4 * random(n_rows, n_channels, seed=1), random(n_channels, seed=2), random(n_channels, seed=3)]
    grad = random(n_rows, n_channels, seed=4)
    given = [x.to(dtype if i < 2 else parameter_dtype(dtype)) for i, x in enumerate(exact)]
    close([compiled.gated_norm(*given, 64e-5)], [plain.gated_norm(*exact, 64e-5)], dtype)
    close(compiled.gated_norm_gradients(*given, 64e-5, grad.to(dtype)), plain.gated_norm_gradients(*exact, 64e-5, grad), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_functions(compiled, dtype):
    shape = (3, 30011)
    a, b, grad = (8 * random(*shape, seed=seed) for seed in range(3))
    narrow = [x.to(dtype) for x in (a, b, grad)]
    close([compiled.relu_squared(narrow[0])], [F.relu(a) ** 2], dtype)
    close(compiled.relu_squared_gradients(narrow[0], narrow[2]), [2 * F.relu(a) * grad], dtype)
    close([compiled.sigmoid_gate(*narrow[:2])], [torch.sigmoid(a) * b], dtype)
    s = torch.sigmoid(a)
    close(compiled.sigmoid_gate_gradients(*narrow), [grad * b * s * (1 - s), grad * s], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_far_from_zero_are_open_or_shut(compiled, dtype):
    gate = torch.tensor([-1e4, -200.0, -89.0, -88.0, -87.0, -20.0, 0.0, 20.0, 88.0, 1e4], dtype=dtype)
    got = compiled.sigmoid_gate(gate, torch.ones_like(gate))
    torch.testing.assert_close(got, torch.sigmoid(gate), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(compiled, value):
    x = torch.tensor([[1.0, value, -2.0, 3.0]])
    ones = torch.ones_like(x)
    rows, parameters = rows_of([(1, -1)]), (torch.ones(4), torch.zeros(4))
    assert not compiled.mixes(rows, x, None, *parameters, [torch.ones(4)], 1e-5)[0].isfinite().all()
    assert not compiled.gated_norm(x.view(1, 1, 4), ones, *parameters, 1e-5).isfinite().all()
    assert not compiled.relu_squared(x).isfinite().all()
    assert not compiled.sigmoid_gate(ones, x).isfinite().all()
    assert compiled.sigmoid_gate(torch.tensor(float("nan")), torch.tensor(1.0)).isnan()
    for dtype in (torch.bfloat16, torch.float16):
        assert not compiled.relu_squared(x.to(dtype)).isfinite().all()


def test_any_number_of_threads_gives_the_same_bits(compiled):
    rows, x = rows_of([(700, -1), (40, 0), (60, 0)]), random(800, 64, dtype=torch.float32)
    given = (rows, x, None, *(random(64, dtype=torch.float32, seed=s) for s in (1, 2)), [random(64, dtype=torch.float32, seed=3)], 1e-5)
    before, found = torch.get_num_threads(), []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        found.append([g for g in compiled.mixes_gradients(*given, [x], None) if g is not None])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def test_views_and_parameters_of_other_types_are_taken(compiled):
    x = random(9, 16, dtype=torch.float32).T.contiguous().T
    rows = rows_of([(9, -1)])
    given = [random(16, seed=s) for s in (1, 2, 3)]
    got, _ = compiled.mixes(rows, x, None, given[0].bfloat16(), given[1].double(), [given[2].half()], 1e-5)
    want, _ = plain.mixes(rows, x.double(), None, given[0], given[1], [given[2]], 1e-5)
    close(got, want, torch.float32)


def test_sizes_that_do_not_fit_are_refused(compiled):
    rows, x, p = rows_of([(3, -1)]), torch.zeros(3, 8), torch.zeros(8)
    for wrong in ((rows, x[:2], None, p, p, [p]), (rows, x, None, p[:7], p, [p]), (rows, x, None, p, p, [p[:1]]),
                  (rows, x, x, p, p, [p]), (rows, x, x[:1].double(), p, p, [p])):  # fmt: skip
        with pytest.raises(ValueError, match="hasn't 8 numbers|beside"):
            compiled.mixes(*wrong, 1e-5)


def test_without_a_compiler_the_functions_are_torchs_own(monkeypatch, caplog):
    from rwkv_dpo.kernels import fused

    fused._of_device.cache_clear()
    monkeypatch.setattr(cpu, "unusable_because", lambda device: "no c++ on PATH")
    assert implementation(torch.zeros(1)) is plain
    assert "no c++ on PATH" in caplog.text
    fused._of_device.cache_clear()
