"""What is found on this machine. Plain values, so that machines that are not here can be written down."""

import contextlib
import os
import platform
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from rwkv_dpo.kernels.agreement import driver_version
from rwkv_dpo.kernels.build import BuildError
from rwkv_dpo.kernels.cache import cache_folder
from rwkv_dpo.kernels.compilers import compiler_name, find_nvcc
from rwkv_dpo.kernels.fused import cpu as fused_cpu
from rwkv_dpo.kernels.fused import cuda as fused_cuda
from rwkv_dpo.kernels.wkv5 import cpu as wkv5_cpu
from rwkv_dpo.kernels.wkv5 import cuda as wkv5_cuda
from rwkv_dpo.kernels.wkv6 import cpu as wkv6_cpu
from rwkv_dpo.kernels.wkv6 import cuda as wkv6_cuda
from rwkv_dpo.kernels.wkv7 import cpu as wkv7_cpu
from rwkv_dpo.kernels.wkv7 import cuda as wkv7_cuda

# By the kind of device that they are made for, and a name.
KERNELS = {
    "cuda": {"wkv5 in CUDA": wkv5_cuda, "wkv6 in CUDA": wkv6_cuda, "wkv7 in CUDA": wkv7_cuda, "a block's functions in CUDA": fused_cuda},
    "cpu": {"wkv5 in C++": wkv5_cpu, "wkv6 in C++": wkv6_cpu, "wkv7 in C++": wkv7_cpu, "a block's functions in C++": fused_cpu},
}


@dataclass(frozen=True)
class Gpu:
    """One of torch's CUDA devices. capability: as (9, 0); memory in bytes."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int

    @property
    def arch(self) -> str:
        """As nvcc and torch call it."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel on the device of this machine. errors: how far from plain PyTorch, relative, by dtype; fault: why it can't be used,
    "" when it can."""

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Facts:
    """device: what a run would take, cuda or cpu. What is not there is "", () or None."""

    device: str
    system: str  # Linux, Windows or Darwin
    is_wsl: bool
    python: str
    torch: str
    torch_cuda: str
    torch_hip: str
    torch_archs: tuple[str, ...]  # of torch's own CUDA kernels, as sm_90 or compute_90
    driver: str
    gpus: tuple[Gpu, ...]
    gpu_fault: str  # why torch can't use a GPU whose driver is there
    nvcc: str
    nvcc_path: str
    cpp: str
    cpu: str
    kernels: tuple[Kernel, ...]
    cache: str
    cache_free: int | None
    here_free: int
    host_free: int | None  # bytes of memory


def gather(device: torch.device, thorough: bool = True) -> Facts:
    """Looks at everything, and compiles kernels. thorough: at every GPU, which takes memory of each, and at kernels although it is known
    how they compare with plain PyTorch; else at this process's GPU alone."""
    nvcc = find_nvcc()
    cache, cache_free = "", None
    with contextlib.suppress(BuildError):
        cache = str(cache_folder())
        cache_free = shutil.disk_usage(cache).free
    gpus, gpu_fault = look_for_gpus(every=thorough)
    return Facts(
        device=device.type, system=platform.system(), is_wsl="microsoft" in platform.release().lower(), python=platform.python_version(),
        torch=torch.__version__, torch_cuda=torch.version.cuda or "", torch_hip=torch.version.hip or "",
        torch_archs=tuple(torch.cuda.get_arch_list()) if gpus else (), driver=driver_version(), gpus=gpus, gpu_fault=gpu_fault,
        nvcc=f"{nvcc.version[0]}.{nvcc.version[1]}" if nvcc else "", nvcc_path=nvcc.path if nvcc else "", cpp=compiler_name(),
        cpu=f"{_cpu_name()}, {torch.get_num_threads()} threads", kernels=look_at_kernels(device, again=thorough), cache=cache,
        cache_free=cache_free, here_free=shutil.disk_usage(".").free, host_free=_host_free(),
    )  # fmt: skip


def look_for_gpus(every: bool) -> tuple[tuple[Gpu, ...], str]:
    """torch's CUDA devices, or the current one alone, and why there is none."""
    try:
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = []
        for i in range(n) if every or not n else (torch.cuda.current_device(),):
            free, total = torch.cuda.mem_get_info(i)
            found.append(Gpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i), total, free))
        if not n and torch.version.cuda and driver_version():
            torch.cuda.init()
        return tuple(found), ""
    except RuntimeError as error:
        return (), str(error).split("\n")[0]


def look_at_kernels(device: torch.device, again: bool) -> tuple[Kernel, ...]:
    """Those made for a device, each built and compared."""
    found = []
    for name, module in KERNELS.get(device.type, {}).items():
        fault = module.unusable_because(device)
        try:
            errors = module.agreement(device, again).errors if fault is None else {}
            found.append(Kernel(name, errors, fault or ""))
        except BuildError as error:
            found.append(Kernel(name, {}, str(error)))
    return tuple(found)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _host_free() -> int | None:
    """Bytes of memory that a program could have; None where the system doesn't say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) << 10
    if sys.platform != "win32" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
