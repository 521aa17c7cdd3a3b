"""The CUDA backends without a GPU: their very source, compiled by g++ against shim/, called by the very Python of kernels/wkvN/cuda.py."""

import ctypes
import hashlib
import importlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import compile_cuda
import pytest
import torch
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.kernels.build import bind
from rwkv_dpo.kernels.compilers import find_nvcc
from rwkv_dpo.kernels.cuda_library import _segments
from wkv_cases import FASTEST, Case

HERE = Path(__file__).parent
SOURCES = next(iter(compile_cuda.RECURRENCES)).parent
VERSIONS = ("5", "6", "7")
COMPILE = (
    "g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-fno-strict-aliasing", "-ffp-contract=fast", "-Wno-unknown-pragmas",
    # Its longjmp takes another stack for a fault.
    "-U_FORTIFY_SOURCE", f"-I{HERE / 'shim'}",
)  # fmt: skip
# -O0: the instrumented code runs for a second and would compile for fifteen.
SANITIZE = ("-O0", "-g1", "-fsanitize=address,bounds,alignment", "-fno-sanitize-recover=all")

# Every remainder that a segment (64 tokens, or 32) and a tile of tokens (2 to 16) can have, empty sequences first, last and between.
ODD_LENGTHS = [0, 1, 63, 64, 0, 65, 131, 7, 0]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def build(cache: pytest.Cache, source: Path, *flags: str) -> Path:
    """The library made of `source` and the shim; kept in pytest's cache until a source or flag changes."""
    texts = [path.read_bytes() for folder in (source.parent, HERE / "shim") for path in sorted(folder.glob("*.*"))]
    digest = hashlib.sha256(b"".join(texts) + repr((flags, source.name)).encode()).hexdigest()[:12]
    built = Path(cache.mkdir("wkv_shim")) / f"{source.stem}_{digest}.so"
    if not built.exists():
        partial = built.with_suffix(f".{os.getpid()}")
        subprocess.run([*COMPILE, *flags, "-o", str(partial), str(source)], check=True)
        partial.replace(built)
    return built


def kernels_of(version):
    return importlib.import_module(f"rwkv_dpo.kernels.wkv{version}.cuda").KERNELS


def built_with(cache: pytest.Cache, version: str, *flags: str) -> Path:
    return build(cache, kernels_of(version).source, *flags)


@pytest.fixture(params=VERSIONS)
def version(request, monkeypatch):
    """Of a recurrence, whose CUDA backend runs on the CPU meanwhile."""
    # Set where this file runs itself once more, under AddressSanitizer.
    path = os.environ.get(f"WKV{request.param}_SHIM") or built_with(request.config.cache, request.param, "-O1")
    kernels = kernels_of(request.param)
    monkeypatch.setitem(kernels.__dict__, "library", bind(ctypes.CDLL(str(path)), kernels.entry_points))
    return request.param


def of_versions(*versions):
    return pytest.mark.parametrize("version", versions, indirect=True)


@pytest.fixture(autouse=True)
def _an_unwritten_element_is_nan():
    """torch.empty fills with NaN in this mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def on_shim(version):
    """The recurrence of the CUDA backend."""
    return getattr(importlib.import_module(f"rwkv_dpo.kernels.wkv{version}.cuda"), f"wkv{version}")


def errors(case, wkv=None, device="cpu", **how):
    """Relative L2 errors of y, state_end and the gradient of every input, against the loop in float64 on the same (rounded) inputs."""
    found, expected = case.run(wkv or on_shim(case.version), device, **how), case.run(exact=True, **how)
    return {name: float((found[name] - x).norm() / x.norm().clamp(min=1e-20)) for name, x in expected.items()}


# fp32 sums of a hundred terms; 1e-6 is what is seen, 2e-5 what the project promises.
def assert_close(found, tolerance=2e-5, others=None):
    wrong = {name: error for name, error in found.items() if not error <= (others or {}).get(name, tolerance)}
    assert not wrong


@pytest.mark.parametrize(
    ("lengths", "n_heads", "head_size"),
    [
        (ODD_LENGTHS, 2, 64), (ODD_LENGTHS, 1, 32), ([3, 70], 3, 8), ([5, 66], 2, 24), ([33], 1, 40),
        ([67, 2], 1, 88), ([67, 2], 1, 96), ([69], 1, 128),
    ],
)  # fmt: skip
def test_values_and_all_gradients_equal_the_loop(version, lengths, n_heads, head_size):
    assert_close(errors(Case(version, lengths, n_heads, head_size)))


# Rounding once to 8 (11) bits of precision makes 1.7e-3 (2e-4); what leaves in fp32 is as exact as ever.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_sixteen_bit_inputs_are_rounded_on_the_way_out_only(version, dtype, rounding):
    rounded = ("y", *(f"gradient of {name}" for name in "rkvab"))
    assert_close(errors(Case(version, [3, 70], 2, 64, dtype=dtype)), others=dict.fromkeys(rounded, rounding))


@pytest.mark.parametrize(
    ("head_size", "dtype"), [(24, torch.float32), (40, torch.bfloat16), (64, torch.float16), (64, torch.float32), (128, torch.bfloat16)]
)
def test_few_tokens_are_enough_to_leave_every_kind_of_remainder(version, head_size, dtype):
    """What AddressSanitizer looks at: a segment and one or three tokens, an empty sequence, a token alone."""
    assert_close(errors(Case(version, [67 if version == "5" else 33, 0, 1], 1, head_size, dtype=dtype)), 3e-3)


# The gradient of a fast decay is a small rest; Adam would turn noise in it into steps. 1e-6 is seen, 1e-3 is promised.
@of_versions("5", "6")
@pytest.mark.parametrize("decays", [(-9.0, -6.0), (-6.0, -3.0), (-3.0, 0.0), (0.0, 1.0), (1.0, 2.0)])
def test_every_band_of_decays_has_an_exact_gradient(version, decays):
    of_decay = "gradient of time_decay" if version == "5" else "gradient of log_w"
    assert_close(errors(Case(version, [200, 3], 1, 32, decays=decays)), others={of_decay: 1e-3 if version == "5" else 2e-5})


@of_versions("5")
def test_decays_of_one_and_zero_neither_overflow_nor_give_nan(version):
    case = Case(version, [130], 1, 8)
    case.inputs["time_decay"][0] = torch.tensor([-30.0, -20.0, 3.0, 5.0, 20.0, 60.0, 88.0, 0.0])
    assert_close(errors(case))


# Where exp(time_decay) leaves fp32 (88.7) and float64 (709.8), beyond, and as far on the other side.
@of_versions("5")
@pytest.mark.parametrize("decay", [80.0, 88.8, 89.0, 200.0, 700.0, 709.9, 1000.0, math.inf, -80.0, -89.0, -200.0, -1000.0, -math.inf])
def test_no_time_decay_gives_nan(version, decay):
    case = Case(version, [67, 0, 3], 2, 8)
    case.inputs["time_decay"][:, ::3] = decay
    assert_close(errors(case))


# Where w leaves fp32's normal numbers (-87.3) and all of them (-103.9), and beyond.
@of_versions("6")
@pytest.mark.parametrize("log_w", [0.0, -1e-30, -88.0, -100.0, -104.0, -745.0, -1e38, -math.inf])
def test_no_log_of_a_decay_gives_nan_or_spoils_its_neighbours(version, log_w):
    case = Case(version, [67, 0, 3], 2, 8)
    case.inputs["log_w"][:, 0, ::3] = log_w
    case.inputs["log_w"][::3, :, 1] = log_w
    assert_close(errors(case))


@of_versions("7")
@pytest.mark.parametrize("log_w", [0.0, FASTEST])
def test_the_slowest_and_the_fastest_decays_are_exact(version, log_w):
    case = Case(version, [70, 1, 0, 33], 1, 32)
    case.inputs["log_w"].fill_(log_w)
    assert_close(errors(case))


def test_a_decay_that_is_no_number_does_not_pass_for_one(version):
    case = Case(version, [3], 1, 8)
    case.inputs["time_decay" if version == "5" else "log_w"][..., 0] = math.nan
    assert case.run(on_shim(version))["y"].isnan().any()


@pytest.mark.parametrize(
    "how", [{"use": ("state_end",)}, {"use": ("y",)}, {"with_state0": False}], ids=["gradient of y", "gradient of state_end", "state0"]
)
def test_what_is_not_given_counts_as_zero(version, how):
    assert_close(errors(Case(version, [66, 0, 3], 1, 16), **how))


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_batch_without_tokens_hands_its_states_on(version, lengths):
    case = Case(version, lengths, 2, 8)
    found = case.run(on_shim(version))
    assert found["y"].shape == (0, 2, 8)
    assert torch.equal(found.pop("state_end").float(), case.inputs["state0"])
    assert torch.equal(found.pop("gradient of state0").float(), case.g_state_end)
    assert not any(x.any() for x in found.values())


def test_views_of_any_layout_are_taken(version):
    case = Case(version, [66], 2, 8)
    expected = case.run(on_shim(version))
    r, k = case.inputs["r"], case.inputs["k"]
    case.inputs["r"] = torch.cat([torch.zeros(1), r.flatten()])[1:].view_as(r)
    case.inputs["k"] = k.transpose(0, 2).contiguous().transpose(0, 2)
    case.gy = case.gy.transpose(0, 1).contiguous().transpose(0, 1)
    found = case.run(on_shim(version))
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("head_size", [32, 64, 96])
def test_no_order_of_blocks_and_threads_changes_a_bit(version, head_size):
    """A missing barrier, or shared memory that another block left behind, would."""
    case, library = Case(version, [70, 9], 1, head_size), kernels_of(version).library
    found = []
    for seed in (0, 1, 2):
        library.shim_set_order(seed)
        found.append(case.run(on_shim(version)))
    library.shim_set_order(0)
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


@of_versions("6", "7")
def test_without_gradients_nothing_is_kept_and_outputs_are_the_same(version):
    case = Case(version, [70, 0, 9], 2, 16)
    with torch.no_grad():
        y, state_end = on_shim(version)(*case.arguments, case.cu_seqlens, case.inputs["state0"])
    expected = case.run(on_shim(version))
    assert torch.equal(y.double(), expected["y"])
    assert torch.equal(state_end.double(), expected["state_end"])


def test_segments_lie_side_by_side_and_never_cross_a_sequence():
    table = _segments(torch.tensor([0, 0, 65, 65, 129]).int().numpy().tobytes(), torch.device("cpu"), 64)
    assert table.rows.tolist() == [[0, 64], [64, 1], [65, 64]]
    assert table.first.tolist() == [0, 0, 2, 2, 3]


def test_what_would_be_read_out_of_bounds_is_refused(version):
    wkv, per_head_or_token = on_shim(version), "log_w" if version == "7" else "u"

    def refused(words, error=ValueError, bounds=None, **changes):
        case = Case(version, [5, 4], 2, 8)
        case.inputs |= {name: change(case.inputs[name]) for name, change in changes.items()}
        with pytest.raises(error, match=words):
            wkv(*case.arguments, case.cu_seqlens if bounds is None else torch.tensor(bounds), case.inputs["state0"])

    refused("cu_seqlens", bounds=[1, 6, 10])
    refused("must rise", bounds=[0, 7, 5])
    refused("k is", k=lambda k: k[1:])
    refused(f"{per_head_or_token} is", **{per_head_or_token: lambda x: x[..., :4]})
    refused("state0 is", state0=lambda x: x[:1])
    refused("of one type", InputError, k=torch.Tensor.half)
    with pytest.raises(InputError, match="head size 12"):
        Case(version, [3], 1, 12).run(wkv)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_backend_says_why_it_cannot_run_on_a_cpu(version):
    assert "cpu" in kernels_of(version).unusable_because(torch.device("cpu"))


def test_the_plain_kernel_of_the_benchmark_equals_the_loop_too(request):
    sequential = compile_cuda.baseline()
    plain = bind(ctypes.CDLL(str(build(request.config.cache, compile_cuda.BASELINE, "-O1"))), sequential.ENTRY_POINTS)
    for lengths, head_size in (([0, 5, 66], 64), ([3], 24), ([7], 128)):
        assert_close(errors(Case("5", lengths, 2, head_size), lambda *a: sequential.wkv5_with(plain, *a)))


def run_under_address_sanitizer(*command: str, **shims: Path) -> subprocess.CompletedProcess:
    """Libraries are named to the command through the environment."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    # Leaks: CPython's own.
    env = os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    env |= {name: str(path) for name, path in shims.items()}
    return subprocess.run([sys.executable, *command], env=env, cwd=HERE.parents[1], capture_output=True, text=True, check=False)


BEYOND_THE_END = """
import ctypes, importlib, os, sys, torch
sys.path[:0] = ["RWKV-v5/src", "tests/kernels"]
from rwkv_dpo.kernels import build, cuda_library
from wkv_cases import Case
version = sys.argv[1]
module = importlib.import_module(f"rwkv_dpo.kernels.wkv{version}.cuda")
cuda_library._segments = lambda *_: cuda_library.Segments(torch.tensor([[0, 10]]).int(), torch.tensor([0, 1]).int())
module.KERNELS.library = build.bind(ctypes.CDLL(os.environ[f"WKV{version}_SHIM"]), module.KERNELS.entry_points)
case = Case(version, [9], 2, 8)
getattr(module, f"wkv{version}")(*case.arguments, case.cu_seqlens)
"""


@pytest.mark.skipif("WKV5_SHIM" in os.environ, reason="is what runs this")
def test_address_sanitizer_sees_no_access_out_of_bounds(request):
    shims = {f"WKV{version}_SHIM": built_with(request.config.cache, version, *SANITIZE) for version in VERSIONS}
    chosen = "few_tokens or without_tokens or any_layout or out_of_bounds_is_refused"
    done = run_under_address_sanitizer("-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__)), **shims)
    assert done.returncode == 0, done.stdout + done.stderr
    # And it would have: one row more than there are.
    done = run_under_address_sanitizer("-c", BEYOND_THE_END, "7", **shims)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_nvcc_links_a_library_with_every_function_that_python_calls():
    """It hides functions that g++ shows: those with a parameter of a type in an anonymous namespace. compile_cuda.py links all sources."""
    compile_cuda.compile_for(kernels_of("5").source, (9, 0), kernels_of("5").entry_points)


PTXAS_REPORT = """
ptxas info    : Compiling entry function '_ZN37_15segment_outputsI13__nv_bfloat16Li64EEEv' for 'sm_90'
ptxas info    : Function properties for _ZN37_15segment_outputsI13__nv_bfloat16Li64EEEv
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 24064 bytes smem
ptxas info    : Compiling entry function '_ZN37_13scan_segmentsENS_7ProblemE' for 'sm_90'
ptxas info    : Function properties for _ZN37_13scan_segmentsENS_7ProblemE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, used 0 barriers
ptxas info    : Compiling entry function '_ZN45_11walk_tokensILb1ELb1EfLi32EEEviiPK7SegmentPKiNS_4WalkIT1_EE' for 'sm_90'
ptxas info    : Function properties for _ZN45_11walk_tokensILb1ELb1EfLi32EEEviiPK7SegmentPKiNS_4WalkIT1_EE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 7680 bytes smem
"""


PTX = """
.visible .entry _ZN37_15segment_outputsI13__nv_bfloat16Li64EEEv(
	.param .u64 _ZN37_15segment_outputsI13__nv_bfloat16Li64EEEv_param_0
)
.maxntid 256
.minnctapersm 1
{
.visible .entry _ZN37_13scan_segmentsENS_7ProblemE(
	.param .align 8 .b8 _ZN37_13scan_segmentsENS_7ProblemE_param_0[104]
)
.maxntid 64, 1, 1
{
.visible .entry _ZN45_11walk_tokensILb1ELb1EfLi32EEEviiPK7SegmentPKiNS_4WalkIT1_EE()
.maxntid 128
{
"""


def test_the_compile_check_reads_spills_from_the_compilers_report():
    assert list(compile_cuda.usages(PTXAS_REPORT, PTX)) == [
        compile_cuda.Usage("segment_outputs bf16 64", 168, 24064, 4, 256),
        compile_cuda.Usage("scan_segments", 56, 0, 0, 64),
        compile_cuda.Usage("walk_tokens backwards fp32 32", 96, 7680, 0, 128),
    ]


@pytest.mark.parametrize(("threads", "blocks"), [(128, 12), (320, 4)])
def test_occupancy_is_that_of_nvidias_example(threads, blocks):
    """CUDA C++ Best Practices, "Calculating Occupancy": 37 registers a thread, on a multiprocessor of 65,536 registers and 64 warps."""
    assert compile_cuda.Usage("", 37, 0, 0, threads).warps((8, 0)) == blocks * threads // 32


def test_a_kernel_that_needs_more_than_is_recorded_is_named():
    def record(registers, threads, nvcc="13.0"):
        return compile_cuda.record(nvcc, {"sm_90": [compile_cuda.Usage("walk", registers, 4096, 0, threads)]})

    assert list(compile_cuda.worse(record(96, 128), record(96, 128))) == []
    assert list(compile_cuda.worse(record(90, 128), record(96, 128))) == []
    [line] = compile_cuda.worse(record(97, 128), record(96, 128))
    assert line.startswith("sm_90 walk: 97 registers, 4096 bytes shared, 16 warps")
    assert list(compile_cuda.worse(record(96, 512), record(96, 128)))
    assert list(compile_cuda.worse(record(97, 128, "13.1"), record(96, 128))) == []
    assert list(compile_cuda.worse(record(96, 128), {"nvcc": "13.0", "kernels": {}})) == ["sm_90 walk is not in cuda_usage.json"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_equal_the_loop_on_a_gpu(version, dtype):
    device = torch.device("cuda")
    assert kernels_of(version).unusable_because(device) is None
    rounding = 2e-5 if dtype == torch.float32 else 3e-3
    rounded = ("y", *(f"gradient of {name}" for name in "rkvab"))
    found = errors(Case(version, [0, 1, 300, 64], 2, 64, dtype=dtype), device=device)
    assert_close(found, others=dict.fromkeys(rounded, rounding))
