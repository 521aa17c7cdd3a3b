"""What the GPU's allocator counts at most in runs of train.py, and what --dry_run estimates.

    ../shared/fake_gpu/run.sh python tests/peaks_on_fake_gpu.py RUNS LOGS

RUNS: a JSON file of train.py's flags by a name. LOGS: a folder for what the runs print. Prints JSON: by name, bytes measured and
estimated by part; or what went wrong. Runs follow one another, each in a fork that finds everything imported.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "RWKV-v5"), str(ROOT / "RWKV-v5/src")]

import deepspeed.runtime.zero.stage3 as stage_3  # noqa: E402 (the path above holds what follows)
import deepspeed.runtime.zero.stage_1_and_2 as stages_1_and_2  # noqa: E402
import torch  # noqa: E402
from rwkv_dpo.commands import train  # noqa: E402
from rwkv_dpo.kernels.agreement import Agreement  # noqa: E402
from rwkv_dpo.kernels.fused import cuda as fused  # noqa: E402
from rwkv_dpo.kernels.wkv5 import cuda as cuda_5  # noqa: E402
from rwkv_dpo.kernels.wkv6 import cuda as cuda_6  # noqa: E402
from rwkv_dpo.kernels.wkv7 import cuda as cuda_7  # noqa: E402
from rwkv_dpo.memory import estimate as memory  # noqa: E402
from rwkv_dpo.run import dry_run  # noqa: E402
from rwkv_dpo.run.flags import parse_flags  # noqa: E402
from rwkv_dpo.run.model import expected_shape  # noqa: E402
from rwkv_dpo.training import checkpoints, last, module  # noqa: E402


def prepare() -> None:
    """Kernels would do nothing, so they needn't be compiled; and values, which mean nothing, must not make an optimizer skip a step or a
    run refuse to save."""
    for cuda in (cuda_5, cuda_6, cuda_7):
        functions = {f"{cuda.KERNELS.name}_{direction}": lambda *_: 0 for direction in ("forward", "backward")}
        cuda.KERNELS.library = SimpleNamespace(**functions)
        cuda.unusable_because = lambda device: None  # type: ignore[attr-defined]
    for kernels in (cuda_5, cuda_6, cuda_7, fused):
        kernels.agreement = lambda device, again=False: Agreement({})  # type: ignore[attr-defined]
    for zero, optimizer in ((stages_1_and_2, "DeepSpeedZeroOptimizer"), (stage_3, "DeepSpeedZeroOptimizer_Stage3")):
        zero.is_invalid_grad_norm = lambda norm: False
        getattr(zero, optimizer).has_overflow = lambda *_, **__: False
    module.skip_unless_finite = lambda *_: None  # type: ignore[attr-defined]
    checkpoints.not_finite = last.not_finite = lambda weights: ""  # type: ignore[attr-defined]
    # A real CUDA can't be used on both sides of a fork; this one has no state.
    torch.cuda._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]


def measure(flags: list[str]) -> dict:
    settings, given = parse_flags(flags)
    plan, _ = dry_run.plan_of(settings, dry_run._model_without_memory(expected_shape(settings, given)))
    train.main(flags)
    return {"measured": torch.cuda.max_memory_allocated(), "estimated": memory.estimate(plan)}


def in_a_fork(flags: list[str], log: Path) -> dict:
    reads, writes = os.pipe()
    process = os.fork()
    if process == 0:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # DeepSpeed's group of one wants a port.
        os.environ["MASTER_PORT"] = str(20_000 + os.getpid() % 10_000)
        try:
            result = measure(flags)
        except BaseException:
            result = {"fault": traceback.format_exc()}
        os.write(writes, json.dumps(result).encode())
        # Taking the interpreter down after CUDA's threads is no part of what is measured.
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as pipe:
        said = pipe.read()
    os.waitpid(process, 0)
    return json.loads(said) if said else {"fault": log.read_text(errors="replace")[-3000:]}


def main(runs: Path, logs: Path) -> None:
    prepare()
    logs.mkdir(exist_ok=True)
    results = {name: in_a_fork(flags, logs / f"{name}.log") for name, flags in json.loads(runs.read_text()).items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
