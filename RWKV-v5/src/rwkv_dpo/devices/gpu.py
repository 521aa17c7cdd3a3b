"""What an NVIDIA GPU can compute, by its compute capability."""

import logging

import torch

from rwkv_dpo.base.errors import refuse

log = logging.getLogger(__name__)

# bf16 and TF32 came with it.
_AMPERE = (8, 0)


def check_gpu(device: torch.device, precision: str) -> None:
    """Refuses a GPU for which this torch has no kernels, and warns of arithmetic that it has no hardware for."""
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if words := without_kernels(name, capability, torch.cuda.get_arch_list()):
        refuse(f"{words}; --accelerator cpu (--device cpu) runs on the CPU")
    if words := slow_precision(precision, name, capability):
        log.warning("%s", words)


def without_kernels(name: str, capability: tuple[int, int], archs: list[str] | tuple[str, ...]) -> str:
    """Says that torch's kernels for some architectures (sm_90, compute_90) can't run on a GPU; "" when one can: code of the same
    generation that is no newer, or text that the driver compiles for any newer one."""
    # ROCm's have other names.
    known = [arch for arch in archs if arch.startswith(("sm_", "compute_"))]
    for arch in known:
        kind, _, number = arch.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        of = int(digits[:-1]), int(digits[-1])
        if of <= capability and (kind == "compute" or of[0] == capability[0]):
            return ""
    if not known:
        return ""
    return (
        f"{name} (compute capability {capability[0]}.{capability[1]}): torch {torch.__version__} has no kernels for it, only for "
        f"{', '.join(known)}; install a torch that has sm_{capability[0]}{capability[1]}"
    )


def slow_precision(precision: str, name: str, capability: tuple[int, int]) -> str:
    """What --precision costs on a GPU that has no hardware for it; "" where it has."""
    if capability >= _AMPERE or precision not in ("bf16", "tf32"):
        return ""
    where = f"{name} (compute capability {capability[0]}.{capability[1]})"
    if precision == "tf32":
        return f"--precision tf32: {where} has no TF32 and computes in fp32, at the speed of fp32; fp16 is faster there"
    return f"--precision bf16: {where} has no bf16 and emulates it, no faster than fp32; fp16 is faster there"
