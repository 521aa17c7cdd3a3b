"""An optimizer step of train.py in every pair of flag values that may meet, and the scripts that score, each in a process of its own.

    ../shared/fake_gpu/run.sh python tests/fake_gpu_runs.py FOLDER [NUMBER ...]

FOLDER takes inputs, run folders and logs; numbers choose some of the runs. A line tells of each: its end, kernel launches and flags.
Exits with 1 when one failed.
"""

import ctypes
import importlib
import itertools
import logging
import os
import sys
import time
import traceback
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cuda"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "RWKV-v5/src"), str(ROOT / "tests")]

import runs  # noqa: E402 (the path above holds it)
from rwkv_dpo.base.errors import InputError  # noqa: E402 (as above)
from rwkv_dpo.base.script import run_script  # noqa: E402 (as above)
from rwkv_dpo.run.rules import check  # noqa: E402 (as above)
from rwkv_dpo.run.settings import settings_of  # noqa: E402 (as above)

# Where values interact: all pairs of them that are not refused occur together.
AXES: dict[str, tuple[dict[str, Any], ...]] = {
    "precision": tuple({"precision": name} for name in ("fp32", "tf32", "fp16", "bf16")),
    "strategy": tuple({"strategy": name} for name in (
        "auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_2_offload",
        "deepspeed_stage_3_offload",
    )),
    "memory": tuple({"grad_cp": name} for name in ("0", "1", "selective")),
    "chunks": ({}, {"chunk_ctx": 16}, {"chunk_ctx": 16, "tbptt": 1}),
    "peft": tuple({"peft": name} for name in ("none", "lora", "dora", "pissa", "rslora", "state")),
    "optim": tuple({"optim": name} for name in ("adamw", "adamw8bit", "adamw_bf16state")),
}  # fmt: skip
# The others: each value occurs.
TURNS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({}, {"dpo": 0}, {"dpo_general_corpus_ratio": 0}, {"dpo_general_corpus_ratio": 1}),
    ({}, {"balance": "none"}, {"dpo_ref": "recompute"}),
    ({}, {"dpo_loss": "plackett_luce,softmax,all_pairs,aot,sft"}, {"dpo_loss": "simpo,orpo,ipo,dpop"}, {"dpo_f_divergence": "js"}),
    ({"dpo_valid_file": True}, {"valid_data_file": True}, {"dpo_wpo": 1}, {"dpo_ref": "recompute", "dpo_ld_alpha": 0.5},
     {"dpo_ref": "recompute", "dpo_sync_ref": 1}),
    ({}, {"dropout": 0.1}, {"epoch_steps": 2, "accumulate_grad_batches": 2}, {"layerwise_lr": 0},
     {"epoch_steps": 3, "accumulate_grad_batches": 3, "batch_tokens": 90}),
    ({}, {"weight_decay": 0.01}, {"enable_progress_bar": True, "log_every_s": 0}, {"save_every": 1, "tensorboard": 1},
     {"accelerator": "auto"}, {"wkv_backend": "cuda"}),
    ({"quant": "nf4"}, {"quant": "int8"}, {"quant": "none"}),
)
# Of the other versions of RWKV, which those above are not.
NEWER: tuple[dict[str, Any], ...] = tuple(
    {"rwkv_version": version, **changes}
    for version in ("6", "7")
    for changes in (
        {"precision": "bf16", "strategy": "auto"},
        {"precision": "fp16", "strategy": "deepspeed_stage_2", "grad_cp": "1", "peft": "lora", "train_extra": "time"},
        {"precision": "fp32", "strategy": "auto", "grad_cp": "selective", "chunk_ctx": 16, "peft": "state"},
    )
)


def combinations() -> list[dict[str, Any]]:
    """The flags of each run: greedily the one that brings together most values which have not met."""
    choices = [c for c in itertools.product(*(range(len(values)) for values in AXES.values())) if is_accepted(merged(c))]
    pairs = {c: set(itertools.combinations(enumerate(c), 2)) for c in choices}
    left = set().union(*pairs.values())
    chosen = []
    while left:
        best = max(choices, key=lambda c: len(pairs[c] & left))
        left -= pairs[best]
        chosen.append(best)
    found = [merged(c) for c in chosen]
    for i, flags in enumerate(found):
        for turn in TURNS:
            more = turn[i % len(turn)]
            if is_accepted(flags | more):
                flags |= more
    return found


def merged(choice: tuple[int, ...]) -> dict[str, Any]:
    return {name: value for i, axis in zip(choice, AXES.values(), strict=True) for name, value in axis[i].items()}


def is_accepted(flags: dict[str, Any]) -> bool:
    try:
        check(settings_of({**flags, "load_model": "a", "data_file": "b", "dpo_valid_file": ""}))
    except InputError:
        return False
    return True


def flags_of(changes: dict[str, Any], folder: Path, number: int) -> list[str]:
    data = folder / ("sharded" if "stage_3" in changes["strategy"] else f"tiny{changes.get('rwkv_version', '')}")
    if "dpo_valid_file" in changes:
        changes = changes | {"dpo_valid_file": data / "valid.save"}
    if "valid_data_file" in changes:
        changes = changes | {"valid_data_file": data / "corpus.bin", "valid_data_type": "uint16", "eval_windows": 2, "eval_every": 1}
    # Values on the device are nonsense: a step may not be finite, which is no fault here.
    settings = {"accelerator": "gpu", "epoch_steps": 1, "epoch_count": 1, "wkv_backend": "auto", "ctx_len": 40, "max_bad_steps": 9}
    return runs.flags(data, folder / f"run{number}", **{**settings, **changes})


def scoring(folder: Path) -> list[tuple[str, list[Any]]]:
    """Scripts other than train.py, and their flags."""
    world, demo, tiny = folder / "world", ROOT / "RWKV-v5/demo", folder / "tiny"
    on_gpu = ["--device", "cuda", "--precision"]
    prepare = ["--source", demo / "preferences.jsonl", "--limit", 6, "--load_model", world / "model.pth", *on_gpu]
    tuned = [folder / f"run{number}" / "adapter-final" for number, changes in enumerate(combinations()) if changes["peft"] == "lora"][:1]
    compare = ["--load_model", tiny / "model.pth", *on_gpu, "bf16"]
    return [
        ("prepare_pairs", [*prepare, "bf16", "--out_dir", folder / "pairs"]),
        ("prepare_pairs", [*prepare, "fp32", "--batch_tokens", 16, "--out_dir", folder / "pairs of fp32"]),
        ("evaluate", [*compare, "--pairs", tiny / "train.save", "--peft_load", *tuned]),
        ("evaluate", [*compare, "--data_file", tiny / "corpus.bin", "--data_type", "uint16", "--ctx_len", 100, "--peft_load", *tuned]),
        ("evaluate", ["--load_model", world / "model.pth", "--prompt", "Who are you?", "--max_tokens", 5, *on_gpu, "fp16"]),
    ]


def live(script: str, flags: list[str], log: Path) -> None:
    """The process of a run; ends with its status, after a line of how many kernels it launched."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from rwkv_dpo.kernels.agreement import Agreement
    from rwkv_dpo.kernels.fused import cuda as fused
    from rwkv_dpo.kernels.wkv5 import cuda as cuda_5
    from rwkv_dpo.kernels.wkv6 import cuda as cuda_6
    from rwkv_dpo.kernels.wkv7 import cuda as cuda_7
    from rwkv_dpo.training import checkpoints, last

    # What kernels that do nothing make agrees with nothing, and weights that came from it are not finite.
    for kernels in (cuda_5, cuda_6, cuda_7, cuda_5.KERNELS, cuda_6.KERNELS, cuda_7.KERNELS, fused):
        kernels.agreement = lambda device, again=False: Agreement({})  # type: ignore[attr-defined]
    checkpoints.not_finite = last.not_finite = lambda weights: ""
    status = 1
    try:
        run_script(lambda: importlib.import_module(f"rwkv_dpo.commands.{script}").main(flags))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    counts = ctypes.CDLL(None).fake_counts
    counts.restype = ctypes.POINTER(ctypes.c_long)
    print(f"launches: {counts()[0]}")
    sys.stdout.flush()
    # Taking the interpreter down after CUDA's threads is no part of what is tested.
    os._exit(status)


def main(folder: Path, numbers: list[int]) -> int:
    # What takes seconds is done once, before there are processes.
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import rwkv_dpo.run.trainer  # noqa: F401
    import torch
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load()
    # The C++ kernels' first use compares gradients, after which autograd's threads don't survive a fork.
    with get_context("fork").Pool(1) as pool:
        pool.apply(write_inputs, (folder,))
    # A real CUDA can't be used on both sides of a fork; this one has no state.
    torch.cuda._is_in_bad_fork = lambda: False
    jobs: list[tuple[str, list[Any]]] = [("train", flags_of(changes, folder, n)) for n, changes in enumerate(combinations())]
    jobs += scoring(folder)
    jobs += [("train", flags_of(changes, folder, n)) for n, changes in enumerate(NEWER, len(jobs))]
    chosen = [(number, *job) for number, job in enumerate(jobs) if not numbers or number in numbers]
    return 1 if sum(not is_well(number, script, list(map(str, flags)), folder) for number, script, flags in chosen) else 0


def write_inputs(folder: Path) -> None:
    newer = {f"tiny{version}": replace(runs.TINY, version=version, ranks=ranks) for version, ranks in runs.RANKS.items()}
    shapes = {"tiny": runs.TINY, "sharded": runs.SHARDED, "world": replace(runs.TINY, vocab_size=65536), **newer}
    for name, shape in shapes.items():
        (folder / name).mkdir(parents=True)
        runs.write_inputs(folder / name, shape, n_pairs=6, longest=24)


def is_well(number: int, script: str, flags: list[str], folder: Path) -> bool:
    """Runs one and tells of it."""
    log, begin = folder / f"log{number}", time.time()
    process = os.fork()
    if process == 0:
        live(script, flags, log)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    said = log.read_text(errors="replace")
    has_kernels = "WKV backend: cuda" in said or "--wkv_backend cuda" in " ".join(flags)
    has_ended = script != "train" or any((folder / f"run{number}").glob("*-final*"))
    well = status == 0 and has_kernels and has_ended and "Traceback" not in said
    end, launches = "well" if well else f"FAILED with {status}", said.rpartition("launches: ")[2].strip()
    print(f"{number}: {end}, {time.time() - begin:.1f} s, {launches} launches: {script}.py {' '.join(flags)}", flush=True)
    if not well:
        print(said[-3000:], flush=True)
    return well


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]]))
