"""What there is to say of a machine: for a person, for a program, and in one line at the start of a run."""

from dataclasses import asdict

from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.machine.facts import Facts, Kernel
from rwkv_dpo.machine.findings import Finding, findings


def as_text(facts: Facts) -> str:
    """A row for each thing that was looked at, then the findings."""
    kept = f", {gigabytes(facts.cache_free)} at {facts.cache}" if facts.cache_free is not None else ""
    rows = [
        ("system", facts.system + (" in WSL" if facts.is_wsl else "") + f", Python {facts.python}"),
        ("CPU", facts.cpu + (f", {gigabytes(facts.host_free)} of memory free" if facts.host_free else "")),
        ("torch", f"{facts.torch}, {_built_for(facts)}"),
        *(("GPU", f"{gpu.name}, {gpu.arch}, {gigabytes(gpu.free)} of {gigabytes(gpu.total)} free") for gpu in facts.gpus),
        ("driver", facts.driver or "no NVIDIA driver"),
        ("nvcc", f"{facts.nvcc} ({facts.nvcc_path})" if facts.nvcc else "none"),
        ("C++", facts.cpp or "no compiler"),
        *(("kernel", f"{kernel.name}: {_state(kernel)}") for kernel in facts.kernels),
        ("disk", f"{gigabytes(facts.here_free)} free here{kept}"),
    ]
    lines = [f"{name:<8}{value}" for name, value in rows]
    return "\n".join([*lines, "", *(_in_words(finding) for finding in findings(facts)), verdict(facts)])


def verdict(facts: Facts) -> str:
    """The last line."""
    faults = sum(finding.is_fault for finding in findings(facts))
    device = "GPU" if facts.device == "cuda" else "CPU"
    if not faults:
        return f"A run on the {device} works here, with every kernel."
    return f"{faults} {'faults' if faults > 1 else 'fault'}; a run takes the {device}."


def as_json_text(facts: Facts) -> str:
    """The facts by their names, and `findings`."""
    return as_json({**asdict(facts), "findings": [finding._asdict() for finding in findings(facts)]}, indent=1)


def in_a_line(facts: Facts) -> str:
    """For the start of a run on a GPU."""
    gpus = (f"{gpu.name}, {gpu.arch}, {gigabytes(gpu.free)} of {gigabytes(gpu.total)} free" for gpu in facts.gpus)
    parts = (
        f"GPU: {'; '.join(gpus)}",
        f"driver {facts.driver or 'unknown'}, torch for {_built_for(facts)}, nvcc {facts.nvcc or 'none'}",
        *(f"{kernel.name} {_state(kernel)}" for kernel in facts.kernels),
        f"{gigabytes(facts.here_free)} of disk free",
    )
    return "; ".join(parts)


def gigabytes(n_bytes: int) -> str:
    """Of 10^9 bytes."""
    return f"{n_bytes / 1e9:.1f} GB"


def _built_for(facts: Facts) -> str:
    if facts.torch_hip:
        return f"ROCm {facts.torch_hip}"
    return f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "CPUs alone"


def _state(kernel: Kernel) -> str:
    if kernel.fault:
        return "can't be used here"
    return "agrees with plain PyTorch to " + ", ".join(f"{error:.0e} in {dtype}" for dtype, error in kernel.errors.items())


def _in_words(finding: Finding) -> str:
    return f"{'fault' if finding.is_fault else 'note'}: {finding.what}" + (f"; {finding.remedy}" if finding.remedy else "")
