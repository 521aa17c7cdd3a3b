"""The CUDA backend without a GPU: its very source, compiled by g++ against shim/, called by the very Python of kernels/wkv5/cuda.py."""

import ctypes
import hashlib
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
from rwkv_dpo.kernels.wkv5 import cuda, reference

HERE = Path(__file__).parent
SOURCES = compile_cuda.KERNELS.parent
COMPILE = (
    "g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-fno-strict-aliasing", "-ffp-contract=fast", "-Wno-unknown-pragmas",
    f"-I{HERE / 'shim'}",
)
# -O0: the instrumented code runs for a second and would compile for fifteen.
SANITIZE = ("-O0", "-g1", "-fsanitize=address,bounds,alignment", "-fno-sanitize-recover=all")

NAMES = ("y", "state_end", "r", "k", "v", "time_decay", "u", "state0")

# Every remainder that a segment (64 tokens) and a tile of tokens (2 to 16) can have, empty sequences first, last and between.
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


@pytest.fixture(scope="module")
def library(request):
    # Set where this file runs itself once more, under AddressSanitizer.
    path = os.environ.get("WKV_SHIM") or build(request.config.cache, compile_cuda.KERNELS, "-O1")
    return bind(ctypes.CDLL(str(path)), cuda.ENTRY_POINTS)


@pytest.fixture(autouse=True)
def _an_unwritten_element_is_nan():
    """torch.empty fills with NaN in this mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def inputs(lengths, n_heads, head_size, dtype=torch.float32, decays=(-6.0, 0.5), seed=0):
    """(r, k, v, time_decay, u, cu_seqlens, state0) and the gradients of (y, state_end)."""
    random = torch.Generator().manual_seed(seed)
    shape, square = (sum(lengths), n_heads, head_size), (len(lengths), n_heads, head_size, head_size)
    r, k, v, gy = (torch.randn(shape, generator=random).to(dtype) for _ in range(4))
    time_decay = torch.empty(shape[1:]).uniform_(*decays, generator=random)
    u = torch.randn(shape[1:], generator=random)
    state0, gstate_end = (torch.randn(square, generator=random) for _ in range(2))
    return (r, k, v, time_decay, u, cu_seqlens(lengths), state0), (gy, gstate_end)


def cu_seqlens(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def values_and_gradients(wkv5, arguments, output_grads, dtype=None):
    """By name: y, state_end and the gradient of every argument, each output's gradient or None being given."""
    r, k, v, time_decay, u, bounds, state0 = arguments
    leaves = {"r": r, "k": k, "v": v, "time_decay": time_decay, "u": u, "state0": state0}
    leaves = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items() if x is not None}
    first_five = [leaves[name] for name in ("r", "k", "v", "time_decay", "u")]
    outputs = wkv5(*first_five, bounds, leaves.get("state0"))
    given = [(x, grad.to(x.dtype)) for x, grad in zip(outputs, output_grads, strict=True) if grad is not None]
    ends, end_grads = zip(*given, strict=True)
    found = torch.autograd.grad(ends, list(leaves.values()), end_grads, allow_unused=True)
    grads = {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(leaves, found, strict=True)}
    return {"y": outputs[0].detach(), "state_end": outputs[1].detach(), **grads}


def errors(wkv5, arguments, output_grads):
    """Relative L2 errors against the loop in float64 on the same (rounded) inputs."""
    got = values_and_gradients(wkv5, arguments, output_grads)
    want = values_and_gradients(reference.wkv5, arguments, output_grads, torch.float64)
    return {name: float((got[name].double() - x).norm() / x.norm().clamp(min=1e-20)) for name, x in want.items()}


def on(library):
    return lambda r, k, v, time_decay, u, bounds, state0=None: cuda.wkv5_with(library, r, k, v, time_decay, u, bounds, state0)


# fp32 sums of a hundred terms; 1e-6 is what is seen, 2e-5 what the project promises.
def assert_close(found, tolerance=2e-5, **others):
    wrong = {name: error for name, error in found.items() if not error <= others.get(name, tolerance)}
    assert not wrong


@pytest.mark.parametrize(
    ("lengths", "n_heads", "head_size"),
    [
        (ODD_LENGTHS, 2, 64), (ODD_LENGTHS, 1, 32), ([3, 70], 3, 8), ([5, 66], 2, 24),
        ([67, 2], 1, 88), ([67, 2], 1, 96), ([69], 2, 128),
    ],
)
def test_values_and_all_gradients_equal_the_loop(library, lengths, n_heads, head_size):
    assert_close(errors(on(library), *inputs(lengths, n_heads, head_size)))


# Rounding once to 8 (11) bits of precision makes 1.7e-3 (2e-4); what leaves in fp32 is as exact as ever.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 3e-3), (torch.float16, 4e-4)])
def test_sixteen_bit_inputs_are_rounded_on_the_way_out_only(library, dtype, rounding):
    found = errors(on(library), *inputs([3, 70], 2, 64, dtype))
    assert_close(found, y=rounding, r=rounding, k=rounding, v=rounding)


# The gradient of a fast decay is a small rest; Adam would turn noise in it into steps. 1e-6 is seen, 1e-3 is promised.
@pytest.mark.parametrize("decays", [(-9.0, -6.0), (-6.0, -3.0), (-3.0, 0.0), (0.0, 1.0), (1.0, 2.0)])
def test_every_band_of_decays_has_an_exact_gradient(library, decays):
    assert_close(errors(on(library), *inputs([200, 3], 1, 32, decays=decays)), time_decay=1e-3)


def test_decays_of_one_and_zero_neither_overflow_nor_give_nan(library):
    arguments, grads = inputs([130], 1, 8)
    arguments[3][0] = torch.tensor([-30.0, -20.0, 3.0, 5.0, 20.0, 60.0, 88.0, 0.0])
    assert_close(errors(on(library), arguments, grads))


# Where exp(time_decay) leaves fp32 (88.7) and float64 (709.8), beyond, and as far on the other side.
@pytest.mark.parametrize("decay", [80.0, 88.8, 89.0, 200.0, 700.0, 709.9, 1000.0, math.inf, -80.0, -89.0, -200.0, -1000.0, -math.inf])
def test_no_time_decay_gives_nan(library, decay):
    arguments, grads = inputs([67, 0, 3], 2, 8)
    arguments[3][:, ::3] = decay
    assert_close(errors(on(library), arguments, grads))


def test_a_decay_that_is_no_number_does_not_pass_for_one(library):
    arguments, _ = inputs([3], 1, 8)
    arguments[3][0, 0] = math.nan
    assert cuda.wkv5_with(library, *arguments)[0].isnan().any()


@pytest.mark.parametrize("missing", ["gradient of y", "gradient of state_end", "state0"])
def test_what_is_not_given_counts_as_zero(library, missing):
    arguments, (gy, gstate_end) = inputs([66, 0, 3], 1, 16)
    if missing == "state0":
        arguments = (*arguments[:-1], None)
    grads = (None if missing == "gradient of y" else gy, None if missing == "gradient of state_end" else gstate_end)
    assert_close(errors(on(library), arguments, grads))


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_batch_without_tokens_hands_its_states_on(library, lengths):
    arguments, grads = inputs(lengths, 2, 8)
    found = values_and_gradients(on(library), arguments, grads)
    assert found["y"].shape == (0, 2, 8)
    assert torch.equal(found["state_end"], arguments[-1])
    assert torch.equal(found["state0"], grads[1])
    assert not found["time_decay"].any()
    assert not found["u"].any()


def test_views_of_any_layout_are_taken(library):
    arguments, grads = inputs([66], 2, 8)
    r, k, v = arguments[:3]
    at_odd_address = torch.cat([torch.zeros(1), r.flatten()])[1:].view_as(r)
    transposed = k.transpose(0, 2).contiguous().transpose(0, 2)
    got = cuda.wkv5_with(library, at_odd_address, transposed, *arguments[2:])
    want = cuda.wkv5_with(library, r, k, v, *arguments[3:])
    assert all(map(torch.equal, got, want))
    assert_close(errors(on(library), arguments, (grads[0].transpose(0, 1).contiguous().transpose(0, 1), grads[1])))


@pytest.mark.parametrize("head_size", [32, 64, 96])
def test_no_order_of_blocks_and_threads_changes_a_bit(library, head_size):
    """A missing barrier, or shared memory that another block left behind, would."""
    arguments, grads = inputs([70, 9], 2, head_size)
    found = []
    for seed in (0, 1, 2):
        library.shim_set_order(seed)
        found.append(values_and_gradients(on(library), arguments, grads))
    library.shim_set_order(0)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in NAMES)


def test_segments_lie_side_by_side_and_never_cross_a_sequence():
    table = cuda._segments(cu_seqlens([0, 65, 0, 64]).numpy().tobytes(), torch.device("cpu"))
    assert table.rows.tolist() == [[0, 64], [64, 1], [65, 64]]
    assert table.first.tolist() == [0, 0, 2, 2, 3]


def test_what_would_be_read_out_of_bounds_is_refused(library):
    (r, k, v, time_decay, u, bounds, state0), _ = inputs([5, 4], 2, 8)
    wrong = {
        "cu_seqlens": (r, k, v, time_decay, u, bounds + 1, state0),
        "must rise": (r, k, v, time_decay, u, torch.tensor([0, 7, 5, 9]), None),
        "k is": (r, k[1:], v, time_decay, u, bounds, state0),
        "u is": (r, k, v, time_decay, u[:, :4], bounds, state0),
        "state0 is": (r, k, v, time_decay, u, bounds, state0[:1]),
    }
    for words, arguments in wrong.items():
        with pytest.raises(ValueError, match=words):
            cuda.wkv5_with(library, *arguments)
    with pytest.raises(InputError, match="of one type"):
        cuda.wkv5_with(library, r, k.half(), v, time_decay, u, bounds, state0)
    with pytest.raises(InputError, match="head size 12"):
        cuda.wkv5_with(library, *inputs([3], 1, 12)[0])


def test_the_backend_says_why_it_cannot_run_on_a_cpu():
    assert "cpu" in cuda.unusable_because(torch.device("cpu"))


def test_the_plain_kernel_of_the_benchmark_equals_the_loop_too(request):
    sequential = compile_cuda.baseline()
    plain = bind(ctypes.CDLL(str(build(request.config.cache, compile_cuda.BASELINE, "-O1"))), sequential.ENTRY_POINTS)
    for lengths, head_size in (([0, 5, 66], 64), ([3], 24), ([7], 128)):
        assert_close(errors(lambda *a: sequential.wkv5_with(plain, *a), *inputs(lengths, 2, head_size)))


def run_under_address_sanitizer(*command: str, shim: Path, name: str = "WKV_SHIM") -> subprocess.CompletedProcess:
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    # Leaks: CPython's own. The library is named to the tests below through the environment.
    env = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", name: str(shim), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], env=env, cwd=HERE.parents[1], capture_output=True, text=True, check=False)


BEYOND_THE_END = """
import ctypes, os, sys, torch
sys.path[:0] = ["RWKV-v5/src"]
from rwkv_dpo.kernels import build
from rwkv_dpo.kernels.wkv5 import cuda
x = torch.randn(9, 2, 8)
cuda._segments = lambda *_: cuda.Segments(torch.tensor([[0, 10]]).int(), torch.tensor([0, 1]).int())
shim = build.bind(ctypes.CDLL(os.environ["WKV_SHIM"]), cuda.ENTRY_POINTS)
cuda.wkv5_with(shim, x, x, x, x[0], x[0], torch.tensor([0, 9]), None)
"""


@pytest.mark.skipif("WKV_SHIM" in os.environ, reason="is what runs this")
def test_address_sanitizer_sees_no_access_out_of_bounds(request):
    shim = build(request.config.cache, compile_cuda.KERNELS, *SANITIZE)
    chosen = "equal_the_loop or sixteen_bit or not_given or without_tokens or any_layout"
    done = run_under_address_sanitizer(
        "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", chosen, str(Path(__file__)), shim=shim
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # And it would have: one row more than there are.
    done = run_under_address_sanitizer("-c", BEYOND_THE_END, shim=shim)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_nvcc_links_a_library_with_every_function_that_python_calls():
    """It hides functions that g++ shows: those with a parameter of a type in an anonymous namespace."""
    compile_cuda.compile_for(compile_cuda.KERNELS, (9, 0), cuda.ENTRY_POINTS)


PTXAS_REPORT = """
ptxas info    : Compiling entry function '_ZN37_15segment_outputsI13__nv_bfloat16Li64EEEv' for 'sm_90'
ptxas info    : Function properties for _ZN37_15segment_outputsI13__nv_bfloat16Li64EEEv
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size, 24064 bytes smem
ptxas info    : Compiling entry function '_ZN37_13scan_segmentsENS_7ProblemE' for 'sm_90'
ptxas info    : Function properties for _ZN37_13scan_segmentsENS_7ProblemE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 56 registers, used 0 barriers
"""


def test_the_compile_check_reads_spills_from_the_compilers_report():
    assert list(compile_cuda.usages(PTXAS_REPORT)) == [
        compile_cuda.Usage("segment_outputs bf16 64", 168, 24064, 4),
        compile_cuda.Usage("scan_segments", 56, 0, 0),
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_equal_the_loop_on_a_gpu(dtype):
    device = torch.device("cuda")
    assert cuda.unusable_because(device) is None
    arguments, grads = inputs([0, 1, 300, 64], 2, 64, dtype)
    arguments = tuple(x if i == 5 else x.to(device) for i, x in enumerate(arguments))
    rounding = 2e-5 if dtype == torch.float32 else 3e-3
    found = errors(cuda.wkv5, arguments, tuple(x.to(device) for x in grads))
    assert_close(found, y=rounding, r=rounding, k=rounding, v=rounding)
