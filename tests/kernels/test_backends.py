"""Every backend that can run here against the defining loop in float64: values and all gradients."""

import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.kernels.agreement import Agreement
from rwkv_dpo.kernels.build import BuildError
from rwkv_dpo.kernels.wkv5 import choose_backend, chunked, cpu, cuda, reference

MODULES = {"chunked": chunked, "cpu": cpu, "cuda": cuda}
BANDS = ((-9, -6), (-6, -3), (-3, 0), (0, 1), (1, 2))
NAMES = ("r", "k", "v", "time_decay", "u", "state0")

# A few hundred fp32 roundings (6e-8 each) add up like their square root, to about 3e-7; the rest is room for other compilers.
FP32 = 2e-5
# One rounding to a 16-bit output: half a unit in the last place is 2^-9 for bf16 and 2^-12 for fp16, inside fp32 is as above.
SIXTEEN_BITS = {torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _one_thread_and_memory_full_of_nan():
    """Deterministic mode makes torch fill every empty tensor with NaN: an output left unwritten can't pass."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(params=["chunked", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request):
    device = torch.device("cuda" if request.param == "cuda" else "cpu")
    reason = MODULES[request.param].unusable_because(device)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return MODULES[request.param].wkv5, device


class Case:
    """Random inputs and output gradients, exact in `dtype`, for packed sequences of the given lengths."""

    def __init__(self, lengths, n_heads, head_size, decays=(-9.0, 2.0), dtype=torch.float32):
        random = torch.Generator().manual_seed(sum(lengths) + 1000 * head_size)
        rows, state = (sum(lengths), n_heads, head_size), (len(lengths), n_heads, head_size, head_size)

        def normal(*shape, dtype=torch.float32):
            return torch.randn(shape, generator=random).to(dtype)

        low, high = torch.as_tensor(decays, dtype=torch.float32).unbind(-1)
        uniform = torch.rand(head_size, n_heads, generator=random).mT
        self.dtype = dtype
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        self.rkv = [normal(*rows, dtype=dtype) for _ in range(3)]
        self.time_decay = low.view(-1, 1) + (high - low).view(-1, 1) * uniform
        self.u = normal(n_heads, head_size)
        self.state0 = normal(*state)
        self.gy, self.g_state_end = normal(*rows, dtype=dtype), normal(*state)

    def run(self, wkv5, device="cpu", exact=False, use=("y", "state_end"), with_state0=True):
        """y, state_end and the gradients of all inputs, in float64 on the CPU; `exact` computes in float64."""

        def to(x, dtype):
            return x.to(device, torch.float64 if exact else dtype)

        inputs = [to(x, self.dtype) for x in self.rkv] + [to(x, torch.float32) for x in (self.time_decay, self.u, self.state0)]
        for x in inputs:
            x.requires_grad_()
        y, state_end = wkv5(*inputs[:5], self.cu_seqlens, inputs[5] if with_state0 else None)
        wanted = inputs if with_state0 else inputs[:5]
        outputs = {"y": (y, to(self.gy, self.dtype)), "state_end": (state_end, to(self.g_state_end, torch.float32))}
        used, gradients = zip(*(outputs[name] for name in use), strict=True)
        found = torch.autograd.grad(used, wanted, gradients, allow_unused=True)
        found = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
        values = {"y": y, "state_end": state_end, **{f"gradient of {n}": g for n, g in zip(NAMES, found, strict=False)}}
        return {name: x.detach().cpu().double() for name, x in values.items()}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        error = (found[name] - x).norm() / x.norm().clamp(min=1e-300)
        assert found[name].shape == x.shape
        # Written so that NaN fails.
        assert error <= tolerance, f"{name}: relative L2 error {error:.1e}"


@pytest.mark.parametrize("head_size", [8, 24, 32, 64, 128])
def test_packed_odd_lengths_agree_with_the_loop_in_float64(backend, head_size):
    wkv5, device = backend
    lengths = [0, 1, 7, 64, 129, 0, 33] if head_size == 64 else [33, 0, 1, 6]
    case = Case(lengths, n_heads=2, head_size=head_size)
    assert_close(case.run(wkv5, device), case.run(reference.wkv5, exact=True), FP32)


@pytest.mark.parametrize("lengths", [[32], [64, 32], [5], [], [0, 0]])
def test_full_chunks_one_sequence_and_no_tokens_agree_with_the_loop(backend, lengths):
    wkv5, device = backend
    case = Case(lengths, n_heads=3, head_size=16)
    use = ("y", "state_end") if sum(lengths) else ("state_end",)
    if not lengths:
        y, state_end = wkv5(*(x.to(device) for x in (*case.rkv, case.time_decay, case.u)), case.cu_seqlens)
        assert (y.shape, state_end.shape) == ((0, 3, 16), (0, 3, 16, 16))
        return
    assert_close(case.run(wkv5, device, use=use), case.run(reference.wkv5, exact=True, use=use), FP32)


@pytest.mark.parametrize("use", [("y",), ("state_end",)])
@pytest.mark.parametrize("with_state0", [True, False])
def test_either_output_may_go_unused_and_state0_may_be_missing(backend, use, with_state0):
    wkv5, device = backend
    case = Case([3, 0, 37], n_heads=2, head_size=32)
    found = case.run(wkv5, device, use=use, with_state0=with_state0)
    assert_close(found, case.run(reference.wkv5, exact=True, use=use, with_state0=with_state0), FP32)


def test_the_gradient_of_time_decay_is_right_in_each_band_of_decays_alone(backend):
    """Fast decays leave a tiny gradient, which Adam would scale up together with any noise in it."""
    wkv5, device = backend
    case = Case([257, 66], n_heads=len(BANDS), head_size=32, decays=BANDS)
    found, expected = (x["gradient of time_decay"] for x in (case.run(wkv5, device), case.run(reference.wkv5, exact=True)))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error < 1e-3).all(), dict(zip(BANDS, error.tolist(), strict=True))


def test_decays_of_one_and_of_zero_overflow_nowhere(backend):
    """time_decay -20 rounds w to 1, time_decay 6 to 0: a quotient of decays would be infinite."""
    wkv5, device = backend
    case = Case([70], n_heads=2, head_size=16, decays=((-20, -12), (4, 6)))
    assert_close(case.run(wkv5, device), case.run(reference.wkv5, exact=True), FP32)


# Where exp(time_decay) leaves fp32 (88.7) and float64 (709.8), beyond, and as far on the other side; infinity is what fp16 makes of 70,000.
EXTREMES = (80.0, 88.7, 88.8, 89.0, 200.0, 709.7, 709.9, 1000.0, 3e38, math.inf, -80.0, -89.0, -104.0, -200.0, -746.0, -1000.0, -math.inf)


@pytest.mark.parametrize("time_decay", EXTREMES)
def test_no_time_decay_gives_nan(backend, time_decay):
    wkv5, device = backend
    case = Case([70, 1, 0, 33], n_heads=2, head_size=16)
    case.time_decay[:, ::3] = time_decay
    expected = case.run(reference.wkv5, exact=True)
    assert all(x.isfinite().all() for x in expected.values())
    assert_close(case.run(wkv5, device), expected, FP32)


@pytest.mark.parametrize(("extreme", "mild"), [(x, 20.0 if x > 0 else -45.0) for x in EXTREMES])
def test_an_extreme_time_decay_is_a_decay_of_0_or_1_to_the_loop(extreme, mild):
    """In float64, 2^-1074 being the least number and 2^-53 half a unit: exp(-exp(20)) = 0 and exp(-exp(-45)) = 1."""
    found, expected = (Case([9, 2], n_heads=1, head_size=8, decays=(x, x)) for x in (extreme, mild))
    expected.time_decay.fill_(mild)
    found.time_decay.fill_(extreme)
    found, expected = found.run(reference.wkv5, exact=True), expected.run(reference.wkv5, exact=True)
    gradients = [values.pop("gradient of time_decay") for values in (found, expected)]
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    # exp(-45) is 2.9e-20, and sums of a hundred products stay far below 1e6.
    assert all(gradient.abs().max() < 1e-13 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [40, 64])
def test_16_bit_inputs_agree_to_one_rounding_of_the_outputs(backend, dtype, head_size):
    wkv5, device = backend
    case = Case([45, 2], n_heads=2, head_size=head_size, dtype=dtype)
    assert_close(case.run(wkv5, device), case.run(reference.wkv5, exact=True), SIXTEEN_BITS[dtype])


def test_chunked_in_float64_agrees_to_rounding():
    case = Case([0, 1, 7, 64, 45], n_heads=2, head_size=24)
    # Roundings of 1e-16, as many as in fp32 above.
    assert_close(case.run(chunked.wkv5, exact=True), case.run(reference.wkv5, exact=True), 1e-13)


@pytest.mark.parametrize("module", [reference, chunked, cpu])
def test_autocast_changes_nothing(module):
    if reason := module.unusable_because(torch.device("cpu")):
        pytest.skip(reason)
    case = Case([37], n_heads=2, head_size=16)
    plain = case.run(module.wkv5)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = case.run(module.wkv5)
    assert_close(under_autocast, plain, 0)


class TestCpu:
    @pytest.fixture(autouse=True)
    def _usable(self):
        if reason := cpu.unusable_because(torch.device("cpu")):
            pytest.skip(reason)

    def test_results_do_not_depend_on_the_number_of_threads(self):
        case = Case([9, 30, 1], n_heads=3, head_size=16)
        one = case.run(cpu.wkv5)
        torch.set_num_threads(3)
        assert_close(case.run(cpu.wkv5), one, 0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("factor", [1.0, 1.5, 1.2345678, 3e-5, 7e4])
    def test_every_16_bit_number_is_read_and_rounded_as_torch_does(self, dtype, factor):
        """With r = k = e_0 and an empty state, y_t = u_0 v_t. Half of all 1.5 v lie between two numbers, at equal distance."""
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        v = every.view(-1, 1, 8)
        r = torch.zeros_like(v)
        r[:, :, 0] = 1
        u = torch.tensor([[factor] + [0.0] * 7])
        y, _ = cpu.wkv5(r, r, v, torch.zeros(1, 8), u, torch.arange(len(v) + 1, dtype=torch.int32))
        expected = (factor * v.float()).to(dtype)
        # Rows with an infinity or a NaN count too; torch.equal would not take NaN for equal.
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)

    def test_float64_is_refused_with_the_backends_that_take_it(self):
        with pytest.raises(InputError, match=r"float64 runs on --wkv_backend reference or chunked"):
            Case([3], n_heads=1, head_size=8).run(cpu.wkv5, exact=True)

    @pytest.mark.parametrize("head_size", [20, 136])
    def test_odd_head_sizes_are_refused(self, head_size):
        with pytest.raises(InputError, match=f"head size {head_size}; accepted are multiples of 8 up to 128"):
            Case([3], n_heads=1, head_size=head_size).run(cpu.wkv5)

    @pytest.mark.parametrize("bounds", [[0, 4], [1, 3], [0, 5, 3]])
    def test_boundaries_outside_the_rows_never_reach_the_kernel(self, bounds):
        case = Case([3], n_heads=1, head_size=8)
        with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 3"):
            cpu.wkv5(*case.rkv, case.time_decay, case.u, torch.tensor(bounds, dtype=torch.int32))

    def test_it_runs_from_any_directory_and_without_the_environment_on_path(self, tmp_path):
        script = (
            "import torch; from rwkv_dpo.kernels.wkv5 import choose_backend; x = torch.ones(5, 1, 8); "
            "wkv = choose_backend('cpu', torch.device('cpu')).wkv5; "
            "print(wkv(x, x, x, torch.zeros(1, 8), torch.zeros(1, 8), torch.tensor([0, 5]))[0][1, 0, 0].item())"
        )
        bare_path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if Path(p) != Path(sys.executable).parent)
        environment = {**os.environ, "PYTHONPATH": str(Path(cpu.__file__).parents[3]), "PATH": bare_path}
        run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        # The second token reads what the first one wrote: the sum over 8 keys of 1 * 1 * 1.
        assert run.stdout.strip() == "8.0", run.stderr


class TestChoice:
    def test_auto_takes_the_fastest_usable_backend_and_logs_why_not_the_others(self, caplog, monkeypatch):
        monkeypatch.setattr(cpu, "unusable_because", lambda device: "no c++ on PATH")
        with caplog.at_level(logging.INFO, "rwkv_dpo.kernels.wkv5"):
            backend = choose_backend("auto", torch.device("cpu"))
        assert (backend.name, backend.wkv5) == ("chunked", chunked.wkv5)
        [record] = caplog.records
        assert record.levelname == "WARNING"
        assert record.message == (
            "WKV backend: chunked, and its part of a step will take several times as long: not cpu, since no c++ on PATH"
        )

    def test_on_a_gpu_the_reason_comes_with_a_warning_of_the_cost(self, caplog, monkeypatch):
        monkeypatch.setattr(cuda, "unusable_because", lambda device: "nvcc fatal: no")
        assert choose_backend("auto", torch.device("cuda")).name == "chunked"
        [record] = caplog.records
        assert record.levelname == "WARNING"
        assert record.message == "WKV backend: chunked, and this run will be several times slower: not cuda, since nvcc fatal: no"

    def test_the_backend_made_for_a_device_is_no_warning(self, caplog, monkeypatch):
        monkeypatch.setattr(cpu, "unusable_because", lambda device: None)
        with caplog.at_level(logging.INFO, "rwkv_dpo.kernels.wkv5"):
            assert choose_backend("auto", torch.device("cpu")).name == "cpu"
        assert [(record.levelname, record.message) for record in caplog.records] == [
            ("INFO", "WKV backend: cpu; not cuda (the device is cpu)")
        ]

    def test_an_unknown_name_is_refused_with_the_known_ones(self):
        with pytest.raises(InputError, match=r"--wkv_backend cpp: accepted are auto, cuda, cpu, chunked, reference"):
            choose_backend("cpp", torch.device("cpu"))

    def test_a_named_backend_is_refused_rather_than_replaced(self):
        with pytest.raises(InputError, match=r"--wkv_backend cpu can't be used on meta: it runs on CPUs only"):
            choose_backend("cpu", torch.device("meta"))

    def test_a_missing_compiler_is_named(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        cpu._library.cache_clear()
        reason = cpu.unusable_because(torch.device("cpu"))
        assert reason == "no no-such-compiler on PATH; install a C++ compiler, or set CXX to one"


class TestCudaReasons:
    @pytest.fixture(autouse=True)
    def _torch_sees_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def test_a_kernel_that_cannot_be_built_or_lacks_a_function_is_a_reason(self, monkeypatch):
        def fail():
            raise BuildError("wkv5_cuda.so has no function wkv5_forward")

        monkeypatch.setattr(cuda, "_library", fail)
        assert cuda.unusable_because(torch.device("cuda")) == "wkv5_cuda.so has no function wkv5_forward"

    @pytest.mark.parametrize(("code", "reason"), [(0, None), (35, "the kernels can't run with this driver: too old (CUDA error 35)")])
    def test_a_driver_that_is_too_old_is_a_reason(self, monkeypatch, code, reason):
        library = SimpleNamespace(wkv5_usable=lambda: code, wkv5_error=lambda code: b"too old")
        monkeypatch.setattr(cuda, "_library", lambda: library)
        monkeypatch.setattr(cuda, "agreement", lambda device: Agreement({}))
        assert cuda.unusable_because(torch.device("cuda")) == reason

    def test_kernels_that_compute_something_else_are_a_reason(self, monkeypatch):
        monkeypatch.setattr(cuda, "_library", lambda: SimpleNamespace(wkv5_usable=lambda: 0))
        monkeypatch.setattr(cuda, "agreement", lambda device: Agreement({"fp32": 0.5}, "its y is off"))
        assert cuda.unusable_because(torch.device("cuda")) == "its y is off"

    def test_a_torch_for_amds_gpus_is_a_reason(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert cuda.unusable_because(torch.device("cuda")) == "this torch is built for AMD's GPUs (ROCm), and the kernels are CUDA"


class TestBuildFailure:
    @pytest.fixture(autouse=True)
    def _broken_kernel(self, tmp_path, monkeypatch):
        if shutil.which("c++") is None:
            pytest.skip("needs a C++ compiler")
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(cpu, "SOURCES", tmp_path)
        (tmp_path / "wkv5_cpu.cpp").write_text('extern "C" int broken() { return undeclared_name; }\n')
        cpu._library.cache_clear()
        yield
        cpu._library.cache_clear()

    def test_a_named_backend_is_refused_with_the_compilers_error(self):
        with pytest.raises(InputError, match=r"--wkv_backend cpu can't be used on cpu: wkv5_cpu.cpp did not compile: .*undeclared_name"):
            choose_backend("cpu", torch.device("cpu"))

    def test_auto_warns_with_the_compilers_error(self, caplog):
        assert choose_backend("auto", torch.device("cpu")).name == "chunked"
        assert "undeclared_name" in caplog.text
        assert "several times as long" in caplog.text
