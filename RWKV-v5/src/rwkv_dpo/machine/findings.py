"""What is wrong with a machine: what will run instead and what that costs, and what to do about it."""

from typing import NamedTuple

from rwkv_dpo.devices.gpu import slow_precision, without_kernels
from rwkv_dpo.machine.facts import Facts, Gpu

# Compiled kernels take a few MB; what a run resumes from 12 bytes for each parameter, twice while it is replaced.
_LOW_CACHE, _LOW_DISK = 50 << 20, 12 << 30


class Finding(NamedTuple):
    """A line each. is_fault: a run does not work, or is slower than this hardware allows; else it is only to be known. remedy: "" where
    nothing need be done."""

    is_fault: bool
    what: str
    remedy: str = ""


def findings(facts: Facts) -> list[Finding]:
    """All that there is to say of a machine, faults first."""
    found = [*_of_torch(facts), *(finding for gpu in dict.fromkeys(facts.gpus) for finding in _of_gpu(gpu, facts)), *_of_compilers(facts),
             *_of_kernels(facts), *_of_system(facts), *_of_disk(facts)]  # fmt: skip
    return sorted(dict.fromkeys(found), key=lambda finding: not finding.is_fault)


def _of_torch(facts: Facts):
    if facts.torch_hip:
        yield Finding(
            True, f"this torch is built for AMD's GPUs (ROCm {facts.torch_hip}): the CUDA kernels can't run, the plain PyTorch backend "
            "`chunked` does, and a run will be several times slower; this is untested",
        )  # fmt: skip
    elif facts.gpu_fault:
        yield Finding(
            True, f"an NVIDIA driver ({facts.driver}) is here, but torch {facts.torch} can't use the GPU: {facts.gpu_fault}; runs take the "
            "CPU", f"update the driver to one that knows CUDA {facts.torch_cuda}, or install a torch for an older CUDA",
        )  # fmt: skip
    elif facts.driver and not facts.torch_cuda:
        yield Finding(
            True, f"an NVIDIA driver ({facts.driver}) is here, but torch {facts.torch} is built for CPUs alone; runs take the CPU",
            "install a torch for CUDA (pytorch.org/get-started says how)",
        )  # fmt: skip
    elif facts.driver and not facts.gpus:
        yield Finding(
            True, f"an NVIDIA driver ({facts.driver}) is here, but no GPU: CUDA_VISIBLE_DEVICES or a container hides it; runs take the CPU",
            "unset CUDA_VISIBLE_DEVICES; start a container with its GPUs (docker run --gpus all)",
        )  # fmt: skip
    elif not facts.gpus:
        yield Finding(False, "no GPU here: train.py needs --accelerator cpu or auto")


def _of_gpu(gpu: Gpu, facts: Facts):
    if words := without_kernels(gpu.name, gpu.capability, facts.torch_archs):
        yield Finding(True, words)
    elif words := slow_precision("bf16", gpu.name, gpu.capability):
        yield Finding(False, words)


def _of_compilers(facts: Facts):
    on_gpu = facts.device == "cuda" and not facts.torch_hip
    major = facts.torch_cuda.partition(".")[0]
    if on_gpu and facts.nvcc and facts.nvcc.partition(".")[0] != major:
        yield Finding(
            False, f"nvcc is of CUDA {facts.nvcc}, torch of {facts.torch_cuda}: the kernels take their own CUDA runtime along, and lose "
            "nothing by it",
        )  # fmt: skip


def _of_kernels(facts: Facts):
    for kernel in facts.kernels:
        if kernel.fault and not (facts.torch_hip or (facts.system == "Windows" and facts.device == "cuda")):
            cost = "a run will be several times slower" if facts.device == "cuda" else "its part of a step takes several times as long"
            yield Finding(True, f"{kernel.name}: not used, plain PyTorch runs instead, and {cost}: {kernel.fault}")


def _of_system(facts: Facts):
    if facts.system == "Windows":
        yield Finding(
            True, "Windows: kernels are built on Linux alone, the plain PyTorch backend `chunked` runs instead, and a run will be several "
            "times slower; DeepSpeed's strategies are not there", "use WSL 2, which is Linux",
        )  # fmt: skip
    if facts.is_wsl:
        yield Finding(
            False, "WSL: all runs as on Linux, but files under /mnt are read through Windows and slow, and more memory than the GPU has is "
            "taken from the host, slowly, instead of failing",
        )  # fmt: skip


def _of_disk(facts: Facts):
    if facts.cache_free is None:
        yield Finding(True, "no folder to keep compiled kernels in", "TORCH_EXTENSIONS_DIR names one that this user can write")
    elif facts.cache_free < _LOW_CACHE:
        yield Finding(True, f"{facts.cache}: {facts.cache_free / 1e6:.0f} MB free, too little to keep compiled kernels in", "make room")
    if facts.here_free < _LOW_DISK:
        yield Finding(
            False, f"{facts.here_free / 1e9:.1f} GB of disk free here, and a run of the 0.4B model keeps 5.5 GB to resume from",
        )  # fmt: skip
