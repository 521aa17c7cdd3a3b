"""Every backend of every recurrence that can run here against the defining loop in float64: values and all gradients."""

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
from rwkv_dpo.kernels import backends, cuda_library
from rwkv_dpo.kernels.agreement import Agreement
from rwkv_dpo.kernels.backends import choose_backend
from rwkv_dpo.kernels.build import BuildError
from rwkv_dpo.kernels.cpp import CppKernels
from rwkv_dpo.kernels.wkv5 import chunked, cpu, cuda
from wkv_cases import FASTEST, Case, assert_close
from wkv_cases import backend as backend_of

BANDS = ((-9, -6), (-6, -3), (-3, 0), (0, 1), (1, 2))

# A few hundred fp32 roundings (6e-8 each) add up like their square root, to about 3e-7; the rest is room for other compilers.
FP32 = 2e-5
# One rounding to a 16-bit output: half a unit in the last place is 2^-9 for bf16 and 2^-12 for fp16, inside fp32 is as above.
SIXTEEN_BITS = {torch.bfloat16: 1e-2, torch.float16: 1e-3}
VERSIONS = ("5", "6", "7")
ALL = [(version, name) for version in VERSIONS for name in ("chunked", "cpu")]
PARAMETERS = [*ALL, *(pytest.param((version, "cuda"), marks=pytest.mark.gpu) for version in VERSIONS)]


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


@pytest.fixture(params=PARAMETERS, ids="wkv{0[0]}-{0[1]}".format)
def backend(request):
    """(version, recurrence, device)."""
    version, name = request.param
    wkv, reason, device = backend_of(version, name)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return version, wkv, device


def of_versions(*versions):
    """Only the backends of these."""
    parameters = [one for one in PARAMETERS if (one.values[0] if hasattr(one, "values") else one)[0] in versions]
    return pytest.mark.parametrize("backend", parameters, ids="wkv{0[0]}-{0[1]}".format, indirect=True)


@pytest.mark.parametrize("head_size", [8, 24, 32, 64, 128])
def test_packed_odd_lengths_agree_with_the_loop_in_float64(backend, head_size):
    version, wkv, device = backend
    lengths = [0, 1, 7, 64, 129, 0, 33] if head_size == 64 else [33, 0, 1, 6]
    case = Case(version, lengths, n_heads=2, head_size=head_size)
    assert_close(case.run(wkv, device), case.run(exact=True), FP32)


@pytest.mark.parametrize("lengths", [[32], [64, 32], [5], [], [0, 0]])
def test_full_chunks_one_sequence_and_no_tokens_agree_with_the_loop(backend, lengths):
    version, wkv, device = backend
    case = Case(version, lengths, n_heads=3, head_size=16)
    use = ("y", "state_end") if sum(lengths) else ("state_end",)
    if not lengths:
        y, state_end = wkv(*(x.to(device) for x in case.arguments), case.cu_seqlens)
        assert (y.shape, state_end.shape) == ((0, 3, 16), (0, 3, 16, 16))
        return
    assert_close(case.run(wkv, device, use=use), case.run(exact=True, use=use), FP32)


@pytest.mark.parametrize("use", [("y",), ("state_end",)])
@pytest.mark.parametrize("with_state0", [True, False])
def test_either_output_may_go_unused_and_state0_may_be_missing(backend, use, with_state0):
    version, wkv, device = backend
    case = Case(version, [3, 0, 37], n_heads=2, head_size=32)
    found = case.run(wkv, device, use=use, with_state0=with_state0)
    assert_close(found, case.run(exact=True, use=use, with_state0=with_state0), FP32)


@of_versions("5", "6")
def test_the_gradient_of_decays_is_right_in_each_band_of_decays_alone(backend):
    """Fast decays leave a tiny gradient, which Adam would scale up together with any noise in it."""
    version, wkv, device = backend
    case = Case(version, [257, 66], n_heads=len(BANDS), head_size=32, decays=BANDS)
    name = {"5": "gradient of time_decay", "6": "gradient of log_w"}[version]
    found, expected = (x[name].view(-1, len(BANDS), 32).transpose(0, 1).flatten(1) for x in (case.run(wkv, device), case.run(exact=True)))
    error = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error < 1e-3).all(), dict(zip(BANDS, error.tolist(), strict=True))


@of_versions("5", "6")
def test_decays_of_one_and_of_zero_overflow_nowhere(backend):
    """-20 rounds w to 1, 6 to 0: a quotient of decays would be infinite."""
    version, wkv, device = backend
    case = Case(version, [70], n_heads=2, head_size=16, decays=((-20, -12), (4, 6)))
    assert_close(case.run(wkv, device), case.run(exact=True), FP32)


@of_versions("6")
@pytest.mark.parametrize("log_w", [0.0, -1e-30, -88.0, -100.0, -104.0, -185.0, -745.0, -1e5, -1e38, -math.inf])
def test_no_log_of_a_decay_gives_nan_or_spoils_its_neighbours(backend, log_w):
    """Channels of one extreme decay, tokens of it among mild ones, and channels without."""
    version, wkv, device = backend
    case = Case(version, [70, 1, 0, 33], n_heads=2, head_size=16)
    case.inputs["log_w"][:, 0, ::3] = log_w
    case.inputs["log_w"][::3, :, 1] = log_w
    expected = case.run(exact=True)
    assert all(x.isfinite().all() for x in expected.values())
    assert_close(case.run(wkv, device), expected, FP32)


@of_versions("7")
@pytest.mark.parametrize("log_w", [0.0, FASTEST])
def test_the_slowest_and_the_fastest_decays_are_exact(backend, log_w):
    version, wkv, device = backend
    case = Case(version, [70, 1, 0, 33], n_heads=2, head_size=32)
    case.inputs["log_w"].fill_(log_w)
    assert_close(case.run(wkv, device), case.run(exact=True), FP32)


# Where exp(time_decay) leaves fp32 (88.7) and float64 (709.8), beyond, and as far on the other side; infinity is what fp16 makes of 70,000.
EXTREMES = (80.0, 88.7, 88.8, 89.0, 200.0, 709.7, 709.9, 1000.0, 3e38, math.inf, -80.0, -89.0, -104.0, -200.0, -746.0, -1000.0, -math.inf)


@of_versions("5")
@pytest.mark.parametrize("time_decay", EXTREMES)
def test_no_time_decay_gives_nan(backend, time_decay):
    version, wkv, device = backend
    case = Case(version, [70, 1, 0, 33], n_heads=2, head_size=16)
    case.inputs["time_decay"][:, ::3] = time_decay
    expected = case.run(exact=True)
    assert all(x.isfinite().all() for x in expected.values())
    assert_close(case.run(wkv, device), expected, FP32)


@pytest.mark.parametrize(("extreme", "mild"), [(x, 20.0 if x > 0 else -45.0) for x in EXTREMES])
def test_an_extreme_time_decay_is_a_decay_of_0_or_1_to_the_loop(extreme, mild):
    """In float64, 2^-1074 being the least number and 2^-53 half a unit: exp(-exp(20)) = 0 and exp(-exp(-45)) = 1."""
    found, expected = (Case("5", [9, 2], n_heads=1, head_size=8) for _ in range(2))
    expected.inputs["time_decay"].fill_(mild)
    found.inputs["time_decay"].fill_(extreme)
    found, expected = found.run(exact=True), expected.run(exact=True)
    gradients = [values.pop("gradient of time_decay") for values in (found, expected)]
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    # exp(-45) is 2.9e-20, and sums of a hundred products stay far below 1e6.
    assert all(gradient.abs().max() < 1e-13 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [40, 64])
def test_16_bit_inputs_agree_to_one_rounding_of_the_outputs(backend, dtype, head_size):
    version, wkv, device = backend
    case = Case(version, [45, 2], n_heads=2, head_size=head_size, dtype=dtype)
    assert_close(case.run(wkv, device), case.run(exact=True), SIXTEEN_BITS[dtype])


@pytest.mark.parametrize("version", VERSIONS)
def test_chunked_in_float64_agrees_to_rounding(version):
    case = Case(version, [0, 1, 7, 64, 45], n_heads=2, head_size=24)
    # Roundings of 1e-16, as many as in fp32 above.
    assert_close(case.run(backend_of(version, "chunked")[0], exact=True), case.run(exact=True), 1e-13)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["reference", "chunked", "cpu"])
def test_autocast_changes_nothing(version, name):
    wkv, reason, _ = backend_of(version, name)
    if reason:
        pytest.skip(reason)
    case = Case(version, [37], n_heads=2, head_size=16)
    plain = case.run(wkv)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = case.run(wkv)
    assert_close(under_autocast, plain, 0)


class TestCpu:
    @pytest.fixture(autouse=True)
    def _usable(self):
        if reason := cpu.unusable_because(torch.device("cpu")):
            pytest.skip(reason)

    @pytest.fixture(params=VERSIONS)
    def wkv(self, request):
        """(version, recurrence)."""
        return request.param, backend_of(request.param, "cpu")[0]

    def test_results_do_not_depend_on_the_number_of_threads(self, wkv):
        version, wkv = wkv
        case = Case(version, [9, 30, 1], n_heads=3, head_size=16)
        one = case.run(wkv)
        torch.set_num_threads(3)
        assert_close(case.run(wkv), one, 0)

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

    def test_float64_is_refused_with_the_backends_that_take_it(self, wkv):
        version, wkv = wkv
        with pytest.raises(InputError, match=r"float64 runs on --wkv_backend reference or chunked"):
            Case(version, [3], n_heads=1, head_size=8).run(wkv, exact=True)

    @pytest.mark.parametrize("head_size", [20, 136])
    def test_odd_head_sizes_are_refused(self, wkv, head_size):
        version, wkv = wkv
        with pytest.raises(InputError, match=f"head size {head_size}; accepted are multiples of 8 up to 128"):
            Case(version, [3], n_heads=1, head_size=head_size).run(wkv)

    @pytest.mark.parametrize("bounds", [[0, 4], [1, 3], [0, 5, 3]])
    def test_boundaries_outside_the_rows_never_reach_the_kernel(self, wkv, bounds):
        version, wkv = wkv
        case = Case(version, [3], n_heads=1, head_size=8)
        with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 3"):
            wkv(*case.arguments, torch.tensor(bounds, dtype=torch.int32))

    @pytest.mark.parametrize("name", ["k", "u", "a", "log_w", "state0"])
    def test_another_shape_never_reaches_the_kernel(self, wkv, name):
        version, wkv = wkv
        case = Case(version, [3], n_heads=2, head_size=8)
        if name not in case.inputs:
            pytest.skip(f"RWKV-{version} has no {name}")
        case.inputs[name] = case.inputs[name][..., :-1]
        with pytest.raises(ValueError, match=f"{name} is .* beside r"):
            case.run(wkv)

    def test_it_runs_from_any_directory_and_without_the_environment_on_path(self, tmp_path):
        script = (
            "import torch; from rwkv_dpo.kernels.backends import choose_backend; x = torch.ones(5, 1, 8); "
            "wkv = choose_backend('5', 'cpu', torch.device('cpu')).wkv; "
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
        with caplog.at_level(logging.INFO, "rwkv_dpo.kernels.backends"):
            backend = choose_backend("5", "auto", torch.device("cpu"))
        assert (backend.name, backend.wkv) == ("chunked", chunked.wkv5)
        [record] = caplog.records
        assert record.levelname == "WARNING"
        assert record.message == (
            "WKV backend: chunked, and its part of a step will take several times as long: not cpu, since no c++ on PATH"
        )

    @pytest.mark.parametrize("version", VERSIONS)
    def test_on_a_gpu_the_reason_comes_with_a_warning_of_the_cost(self, caplog, monkeypatch, version):
        monkeypatch.setattr(f"rwkv_dpo.kernels.wkv{version}.cuda.unusable_because", lambda device: "nvcc fatal: no")
        assert choose_backend(version, "auto", torch.device("cuda")).name == "chunked"
        [record] = caplog.records
        assert record.levelname == "WARNING"
        assert record.message == "WKV backend: chunked, and this run will be several times slower: not cuda, since nvcc fatal: no"

    def test_the_backend_made_for_a_device_is_no_warning(self, caplog, monkeypatch):
        monkeypatch.setattr(cpu, "unusable_because", lambda device: None)
        with caplog.at_level(logging.INFO, "rwkv_dpo.kernels.backends"):
            assert choose_backend("5", "auto", torch.device("cpu")).name == "cpu"
        assert [(record.levelname, record.message) for record in caplog.records] == [
            ("INFO", "WKV backend: cpu; not cuda (the device is cpu)")
        ]

    def test_an_unknown_name_is_refused_with_the_known_ones(self):
        with pytest.raises(InputError, match=r"--wkv_backend cpp: accepted are auto, cuda, cpu, chunked, reference"):
            choose_backend("5", "cpp", torch.device("cpu"))

    def test_a_named_backend_is_refused_rather_than_replaced(self):
        with pytest.raises(InputError, match=r"--wkv_backend cpu can't be used on meta: it runs on CPUs only"):
            choose_backend("5", "cpu", torch.device("meta"))

    def test_a_missing_compiler_is_named(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        kernels = CppKernels("wkv5", ())
        reason = kernels.unusable_because(torch.device("cpu"))
        assert reason == "no no-such-compiler on PATH; install a C++ compiler, or set CXX to one"

    @pytest.mark.parametrize("version", VERSIONS)
    def test_on_a_gpu_cuda_comes_first(self, monkeypatch, version):
        monkeypatch.setattr(f"rwkv_dpo.kernels.wkv{version}.cuda.unusable_because", lambda device: None)
        assert choose_backend(version, "auto", torch.device("cuda")).name == "cuda"

    def test_a_backend_that_a_version_lacks_is_refused_and_passed_over(self, caplog, monkeypatch):
        monkeypatch.setattr(backends, "offers", lambda version, name: name != "cuda")
        with pytest.raises(InputError, match="--wkv_backend cuda can't be used on cuda: RWKV-7 has none"):
            choose_backend("7", "cuda", torch.device("cuda"))
        assert choose_backend("7", "auto", torch.device("cuda")).name == "chunked"
        assert "this run will be several times slower: not cuda, since RWKV-7 has none" in caplog.text


class TestCudaReasons:
    @pytest.fixture(autouse=True)
    def _torch_sees_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def test_a_kernel_that_cannot_be_built_or_lacks_a_function_is_a_reason(self, monkeypatch):
        def fail(source, entry_points):
            raise BuildError("wkv5_cuda.so has no function wkv5_forward")

        monkeypatch.setattr(cuda_library, "load_kernels", fail)
        monkeypatch.delitem(cuda.KERNELS.__dict__, "library", raising=False)
        assert cuda.unusable_because(torch.device("cuda")) == "wkv5_cuda.so has no function wkv5_forward"

    @pytest.mark.parametrize(("code", "reason"), [(0, None), (35, "the kernels can't run with this driver: too old (CUDA error 35)")])
    def test_a_driver_that_is_too_old_is_a_reason(self, monkeypatch, code, reason):
        library = SimpleNamespace(kernels_usable=lambda: code, kernels_error=lambda code: b"too old")
        monkeypatch.setitem(cuda.KERNELS.__dict__, "library", library)
        monkeypatch.setattr(cuda.KERNELS, "agreement", lambda device: Agreement({}))
        assert cuda.unusable_because(torch.device("cuda")) == reason

    def test_kernels_that_compute_something_else_are_a_reason(self, monkeypatch):
        monkeypatch.setitem(cuda.KERNELS.__dict__, "library", SimpleNamespace(kernels_usable=lambda: 0))
        monkeypatch.setattr(cuda.KERNELS, "agreement", lambda device: Agreement({"fp32": 0.5}, "its y is off"))
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
        (tmp_path / "wkv5_cpu.cpp").write_text('extern "C" int broken() { return undeclared_name; }\n')
        kernels = CppKernels("wkv5", ())
        kernels.folder = tmp_path
        monkeypatch.setattr(cpu, "unusable_because", kernels.unusable_because)

    def test_a_named_backend_is_refused_with_the_compilers_error(self):
        with pytest.raises(InputError, match=r"--wkv_backend cpu can't be used on cpu: wkv5_cpu.cpp did not compile: .*undeclared_name"):
            choose_backend("5", "cpu", torch.device("cpu"))

    def test_auto_warns_with_the_compilers_error(self, caplog):
        assert choose_backend("5", "auto", torch.device("cpu")).name == "chunked"
        assert "undeclared_name" in caplog.text
        assert "several times as long" in caplog.text
