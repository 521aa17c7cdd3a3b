"""The functions between a block's matrix products: compiled ones against torch's operations in float64, values and all gradients."""

import ctypes
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.kernels.build import bind
from rwkv_dpo.kernels.fused import Rows, cpu, cuda, implementation, plain
from test_cuda_source import SANITIZE, build, run_under_address_sanitizer
from torch import Tensor

# Relative L2 errors. fp64, fp32: a few hundred roundings (1e-16, 6e-8) add up like their square root, to 2e-15 and 1e-6. 16 bits: half a
# unit in the last place (2^-9, 2^-12) of each result, and in mixes of the norm before it, where what is mixed cancels.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def _memory_full_of_nan():
    """An output left unwritten can't pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["cpu", "cuda on a CPU", pytest.param("cuda", marks=pytest.mark.gpu)])
def compiled(request):
    """The functions, and where they run; the CUDA source also as tests/kernels/shim makes it run on a CPU."""
    if request.param == "cuda on a CPU":
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        # Set where this file runs itself once more, under AddressSanitizer.
        path = os.environ.get("FUSED_SHIM") or build(request.config.cache, cuda.SOURCE, "-O1")
        yield cuda.Functions(bind(ctypes.CDLL(str(path)), cuda.CUDA_ENTRY_POINTS), 5)
        return
    module = {"cpu": cpu, "cuda": cuda}[request.param]
    if reason := module.unusable_because(torch.device(request.param)):
        pytest.skip(reason)
    torch.set_default_device(request.param)
    yield module.functions()
    torch.set_default_device("cpu")


@pytest.fixture
def only_cpu(compiled):
    """For what the CUDA kernels don't take."""
    if compiled._strip != cpu.STRIP:
        pytest.skip("of the CPU's functions alone")


@pytest.fixture
def takes(compiled):
    """Skips a dtype that they don't take."""

    def check(dtype):
        if dtype == torch.float64 and compiled._strip != cpu.STRIP:
            pytest.skip("the CUDA kernels have no float64")

    return check


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """The same numbers in any dtype, which bf16 has."""
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape)).bfloat16().to(dtype)


def rows_of(lengths_and_parents: list[tuple[int, int]]) -> Rows:
    builder = ForestBuilder()
    for length, parent in lengths_and_parents:
        builder.add([1] * length, parent)
    forest, _ = builder.build()
    forest = forest.to(torch.get_default_device())
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


@pytest.mark.parametrize("forest", FORESTS)
@pytest.mark.parametrize(
    ("dtype", "handed", "lacking", "n_mixes", "n_channels"),
    [
        *((dtype, handed, (), 2, 40) for dtype in DTYPES for handed in (False, True)),
        *((torch.float32, True, lacking, 2, 40) for lacking in ((1,), ("last",), (0, 1))),
        *((torch.float32, True, (), n_mixes, 8) for n_mixes in (3, 4, 6)),
        (torch.float32, False, (), 1, 132),
    ],
)  # fmt: skip
@pytest.mark.parametrize("of_before", [False, True])
def test_mixes(compiled, takes, forest, dtype, handed, lacking, n_mixes, n_channels, of_before):
    takes(dtype)
    rows = rows_of(FORESTS[forest])
    n_rows, n_segments = rows.before.numel(), rows.last_rows.numel()
    exact = [random(n_rows, n_channels), random(rows.n_roots, n_channels, seed=1) if handed else None, random(n_channels, seed=2),
             random(n_channels, seed=3), [random(1, 1, n_channels, seed=4 + m) for m in range(n_mixes)]]  # fmt: skip
    grads = [None if m in lacking else random(n_rows, n_channels, seed=10 + m) for m in range(n_mixes)]
    g_last = None if "last" in lacking else random(n_segments, n_channels, seed=20)
    g_past = random(n_rows, n_channels, seed=21) if handed else None

    def to(x):
        return None if x is None else x.to(dtype)

    parameters = [p.to(parameter_dtype(dtype)) for p in (*exact[2:4], *exact[4])]
    given = (rows, to(exact[0]), to(exact[1]), *parameters[:2], parameters[2:], 1e-5)
    mixed, last = compiled.mixes(*given, of_before)
    want_mixed, want_last = plain.mixes(rows, *exact, 1e-5, of_before)
    close([*mixed, last], [*want_mixed, want_last], dtype)
    assert mixed.dtype == last.dtype == dtype
    got = compiled.mixes_gradients(*given, [to(g) for g in grads], to(g_last), to(g_past), of_before)
    if any(g is not None for g in (*grads, g_last)):
        close(got, plain.mixes_gradients(rows, *exact, 1e-5, grads, g_last, g_past, of_before), dtype)
    assert [g.shape for g in got if g is not None] == [x.shape for x in (given[1], given[2], *parameters) if x is not None]


def test_what_a_row_is_mixed_with_is_the_row_before_it_in_its_own_segment():
    """plain's own oracle: LayerNorm of torch, and a loop."""
    rows, x, handed = rows_of([(3, -1), (2, -1), (2, 0)]), random(7, 4), random(2, 4, seed=1)
    (mixed,), last = plain.mixes(rows, x, handed, torch.ones(4).double(), torch.zeros(4).double(), [torch.tensor([0.25] * 4)], 1e-5)
    n = F.layer_norm(x, (4,))
    before = torch.stack([handed[0], n[0], n[1], handed[1], n[3], n[2], n[5]])
    torch.testing.assert_close(mixed, 0.25 * n + 0.75 * before)
    (other,), _ = plain.mixes(rows, x, handed, torch.ones(4).double(), torch.zeros(4).double(), [torch.tensor([0.25] * 4)], 1e-5, True)
    torch.testing.assert_close(other, 0.75 * n + 0.25 * before)
    assert torch.equal(last, n[[2, 4, 6]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_rows", "n_heads", "head_size"), [(0, 2, 8), (1, 1, 8), (131, 3, 24)])
def test_gated_norm(compiled, takes, dtype, n_rows, n_heads, head_size):
    takes(dtype)
    n_channels = n_heads * head_size
    exact = [random(n_rows, n_heads, head_size), 4 * random(n_rows, n_channels, seed=1), *(random(n_channels, seed=s) for s in (2, 3))]
    grad = random(n_rows, n_channels, seed=4)
    given = [x.to(dtype if i < 2 else parameter_dtype(dtype)) for i, x in enumerate(exact)]
    close([compiled.gated_norm(*given, 64e-5)], [plain.gated_norm(*exact, 64e-5)], dtype)
    close(compiled.gated_norm_gradients(*given, 64e-5, grad.to(dtype)), plain.gated_norm_gradients(*exact, 64e-5, grad), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lacking", [(), (1, 4)])
@pytest.mark.parametrize(("n_rows", "n_channels"), [(0, 8), (131, 72)])
def test_token_mixes(compiled, takes, dtype, lacking, n_rows, n_channels):
    takes(dtype)
    exact = [random(n_rows, n_channels), random(n_rows, n_channels, seed=1), random(5, n_rows, n_channels, seed=2)]
    mixing = [random(1, 1, n_channels, seed=3 + m) for m in range(5)]
    grads = [None if m in lacking else random(n_rows, n_channels, seed=10 + m) for m in range(5)]
    given, narrow = [x.to(dtype) for x in exact], [mix.to(parameter_dtype(dtype)) for mix in mixing]
    close(compiled.token_mixes(*given, narrow), plain.token_mixes(*exact, mixing), dtype)
    got = compiled.token_mixes_gradients(*given, narrow, [None if g is None else g.to(dtype) for g in grads])
    close(got, plain.token_mixes_gradients(*exact, mixing, grads), dtype)
    assert [g.shape for g in got] == [x.shape for x in (*given, *narrow)]


# By name: inputs, those of parameters last, and what else the function takes; outputs.
RWKV7 = {
    "delta_keys": ("k a", "a0 k_k k_a", ("n_heads",), 3),
    "bonus_norm": ("Y gate R K V", "r_k weight bias", ("eps",), 1),
    "blend": ("own first depth", "v0", (), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_rows", "n_heads", "head_size"), [(0, 2, 8), (1, 1, 8), (131, 3, 24)])
@pytest.mark.parametrize("name", RWKV7)
def test_functions_of_rwkv_7(compiled, takes, name, dtype, n_rows, n_heads, head_size):
    takes(dtype)
    rows, parameters, others, n_out = RWKV7[name]
    # Capitals: split into heads.
    shapes = [(n_rows, n_heads, head_size) if row.isupper() else (n_rows, n_heads * head_size) for row in rows.split()]
    exact = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    exact += [random(1, 1, n_heads * head_size, seed=10 + i) for i, _ in enumerate(parameters.split())]
    if name == "bonus_norm":
        exact[5], exact[6:] = exact[5].view(n_heads, head_size), [x.flatten() for x in exact[6:]]
    others = [{"n_heads": n_heads, "eps": 64e-5}[other] for other in others]
    grads = [random(n_rows, n_heads * head_size, seed=20 + i) for i in range(n_out)]
    n_split = len(rows.split())
    given = [x.to(dtype if i < n_split else parameter_dtype(dtype)) for i, x in enumerate(exact)]
    got, want = (getattr(functions, name)(*inputs, *others) for functions, inputs in ((compiled, given), (plain, exact)))
    close(got if n_out > 1 else [got], want if n_out > 1 else [want], dtype)
    got = getattr(compiled, f"{name}_gradients")(*given, *others, *(g.to(dtype) for g in grads))
    close(got, getattr(plain, f"{name}_gradients")(*exact, *others, *grads), dtype)
    assert [g.shape for g in got] == [x.shape for x in given]


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_decay(compiled, takes, dtype):
    takes(dtype)
    x, w0, grad = 8 * random(131, 72), random(1, 1, 72, seed=1), random(131, 72, seed=2)
    log_w = compiled.log_decay(x.to(dtype), w0.to(parameter_dtype(dtype)))
    assert log_w.dtype == parameter_dtype(dtype)
    # In 16 bits too: neither the input's rounding nor the output's is in the way.
    close([log_w], [-torch.sigmoid(w0.view(-1) + x) / math.e**0.5], parameter_dtype(dtype))
    exact = -torch.sigmoid(w0.view(-1) + x) / math.e**0.5
    s = torch.sigmoid(w0.view(-1) + x)
    want = grad * exact * (1 - s)
    got = compiled.log_decay_gradients(log_w, grad.to(log_w.dtype), dtype)
    close(got, [want, want.sum(0)], dtype)
    assert got[0].dtype == dtype


def test_a_head_without_length_is_divided_by_the_least(compiled):
    """RWKV-LM's F.normalize: zeros stay zeros, and have finite gradients."""
    k = torch.zeros(2, 8)
    k[1, 4:] = 1e-13
    ones = torch.ones(8)
    _, taken, _ = compiled.delta_keys(k, torch.zeros(2, 8), ones, ones, ones, 2)
    torch.testing.assert_close(taken, -F.normalize(k.view(2, 2, 4), dim=-1, eps=1e-12).view(2, 8))
    grads = compiled.delta_keys_gradients(k, torch.zeros(2, 8), ones, ones, ones, 2, *(torch.ones(2, 8) for _ in range(3)))
    given, grad = [x.double() for x in (k, 0 * k, ones, ones, ones)], torch.ones(2, 8).double()
    want = plain.delta_keys_gradients(*given, 2, grad, grad, grad)
    close(grads, want, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_functions(compiled, takes, dtype):
    takes(dtype)
    shape = (3, 3012)
    a, b, grad = (8 * random(*shape, seed=seed) for seed in range(3))
    narrow = [x.to(dtype) for x in (a, b, grad)]
    close([compiled.relu_squared(narrow[0])], [F.relu(a) ** 2], dtype)
    close(compiled.relu_squared_gradients(narrow[0], narrow[2]), [2 * F.relu(a) * grad], dtype)
    close([compiled.sigmoid_gate(*narrow[:2])], [torch.sigmoid(a) * b], dtype)
    s = torch.sigmoid(a)
    close(compiled.sigmoid_gate_gradients(*narrow), [grad * b * s * (1 - s), grad * s], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_far_from_zero_are_open_or_shut(compiled, takes, dtype):
    takes(dtype)
    gate = torch.tensor([-1e4, -200.0, -89.0, -88.0, -87.0, -20.0, 0.0, 0.5, 20.0, 50.0, 88.0, 1e4], dtype=dtype)
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
    assert compiled.sigmoid_gate(torch.full((4,), float("nan")), torch.ones(4)).isnan().all()
    for dtype in (torch.bfloat16, torch.float16):
        assert not compiled.relu_squared(x.to(dtype)).isfinite().all()


def test_any_number_of_threads_gives_the_same_bits(compiled, only_cpu):
    rows, x = rows_of([(700, -1), (40, 0), (60, 0)]), random(800, 64, dtype=torch.float32)
    given = (rows, x, None, *(random(64, dtype=torch.float32, seed=s) for s in (1, 2)), [random(64, dtype=torch.float32, seed=3)], 1e-5)
    before, found = torch.get_num_threads(), []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        found.append([g for g in compiled.mixes_gradients(*given, [x], None, None) if g is not None])
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
        with pytest.raises(ValueError, match=r"hasn't 8 numbers|beside"):
            compiled.mixes(*wrong, 1e-5)


def test_odd_sizes_are_taken_by_a_cpu(compiled, only_cpu):
    rows, x = rows_of([(70, -1)]), random(70, 37, dtype=torch.float32)
    parameters = [random(37, dtype=torch.float32, seed=s) for s in (1, 2, 3)]
    wide = [p.double() for p in parameters]
    got = compiled.mixes_gradients(rows, x, None, *parameters[:2], parameters[2:], 1e-5, [x], None, None)
    close(got, plain.mixes_gradients(rows, x.double(), None, *wide[:2], wide[2:], 1e-5, [x.double()], None, None), torch.float32)
    close([compiled.relu_squared(x)], [F.relu(x.double()) ** 2], torch.float32)


def test_rows_that_the_kernels_have_not_go_to_torch():
    assert not cuda.takes(torch.zeros(1, 8, dtype=torch.float64))
    assert not cuda.takes(torch.zeros(1, 6))
    assert not cuda.takes(torch.zeros(1, 4100, dtype=torch.bfloat16))
    assert not cuda.takes(torch.zeros(1, 4096))
    assert cuda.takes(torch.zeros(1, 4096, dtype=torch.bfloat16))
    assert cuda.takes(torch.zeros(1, 64, 64, dtype=torch.bfloat16))
    assert not cuda.takes(torch.zeros(1, 80, 64, dtype=torch.bfloat16))


def test_more_mixes_than_the_kernels_have_are_refused(request):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    functions = cuda.Functions(bind(ctypes.CDLL(str(build(request.config.cache, cuda.SOURCE, "-O1"))), cuda.CUDA_ENTRY_POINTS), 5)
    p = torch.zeros(8)
    with pytest.raises(RuntimeError, match="mixes_forward: invalid configuration"):
        functions.mixes(rows_of([(3, -1)]), torch.zeros(3, 8), None, p, p, [p] * 5, 1e-5)


@pytest.mark.skipif("FUSED_SHIM" in os.environ, reason="is what runs this")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_address_sanitizer_sees_no_access_out_of_bounds(request):
    shim = build(request.config.cache, cuda.SOURCE, *SANITIZE)
    chosen = "cuda and on and (odd or gated or elementwise or rwkv_7 or log_decay or token_mixes)"
    done = run_under_address_sanitizer(
        "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__)), FUSED_SHIM=shim
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_without_a_compiler_the_functions_are_torchs_own(monkeypatch, caplog):
    from rwkv_dpo.kernels import fused

    fused._of_device.cache_clear()
    monkeypatch.setattr(cpu, "unusable_because", lambda device: "no c++ on PATH")
    assert implementation(torch.zeros(1)) is plain
    assert "no c++ on PATH" in caplog.text
    fused._of_device.cache_clear()
