"""--dry_run 1: what a run would need, without running it."""

import logging
from pathlib import Path

import numpy as np
import torch

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.pair_files import open_pairs
from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.devices.device import COMPUTE_DTYPES
from rwkv_dpo.devices.strategy import uses_ddp
from rwkv_dpo.kernels.backends import choose_backend, offers
from rwkv_dpo.memory.estimate import PARTS, Plan, alternatives, estimate, total
from rwkv_dpo.model.checkpoint import empty_model
from rwkv_dpo.model.linear import Linear
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.run.data import check_fits
from rwkv_dpo.run.settings import RunSettings
from rwkv_dpo.tuning.adapter_files import read_adapter
from rwkv_dpo.tuning.settings import TuningSettings
from rwkv_dpo.tuning.tuning import plan_of as adapter_of

log = logging.getLogger(__name__)

LORA_RANK = 32


def dry_run(settings: RunSettings, shape: ModelShape) -> str:
    """The report: parameters, the largest micro-batch, estimated peak memory by part, and what each memory flag would save."""
    if shape.vocab_size < 1:
        refuse("--vocab_size is needed for --dry_run 1 without --load_model")
    model = _model_without_memory(shape)
    plan, batch = plan_of(settings, model)
    n_lora = sum(LORA_RANK * sum(weight.shape) for weight in _projections(model))
    n_state = shape.n_layer * shape.dim_att * shape.head_size
    parts, peak = estimate(plan), total(plan)
    lines = [
        f"RWKV-{shape.version} L{shape.n_layer} D{shape.n_embd} vocabulary {shape.vocab_size:,}: {plan.n_parameters:,} parameters, "
        f"{plan.n_trainable:,} of them trained",
        f"largest micro-batch: {batch}; {plan.n_tokens:,} tokens, {plan.n_rows:,} of them scored",
        f"estimated peak memory on {'each' if plan.world_size > 1 else 'the'} {'GPU' if plan.on_gpu else 'CPU process'}, GB",
        *(f"  {name:<12}{parts[name] / 1e9:8.2f}" for name in PARTS),
        f"  {'together':<12}{peak / 1e9:8.2f}" + ("" if plan.on_gpu else "   (and about 0.5 for Python and the libraries)"),
        "with one flag changed, GB",
    ]
    for flag, other in alternatives(plan, n_lora, n_state).items():
        saved = peak - total(other)
        lines.append(f"  {flag:<24}{total(other) / 1e9:8.2f}   " + (f"saves {saved / 1e9:.2f}" if saved > 5e6 else "saves nothing"))
    return "\n".join(lines)


def plan_of(settings: RunSettings, model: RWKV) -> tuple[Plan, str]:
    """The run as `memory.estimate` takes it, and a description of its largest micro-batch."""
    devices, optim, ctx_len = settings.devices, settings.optimizer.optim, settings.data.ctx_len
    peft, strategy = settings.tuning.peft, settings.devices.strategy
    n_weights = sum(p.numel() for p in model.parameters())
    n_added, extra = _tuned(settings.tuning, model)
    n_trainable = n_weights if peft == "none" else n_added + sum(model.get_parameter(name).numel() for name in extra)
    compute_bytes = COMPUTE_DTYPES[devices.precision].itemsize
    windows, pair_sizes, words, accumulates = _largest_micro_batch(settings)
    on_gpu = devices.accelerator in ("gpu", "cuda") or (devices.accelerator == "auto" and torch.cuda.is_available())
    zero_stage = int(strategy.split("_")[2]) if strategy.startswith("deepspeed") else 0
    plan = Plan(
        shape=model.shape, n_parameters=n_weights + n_added, n_trainable=n_trainable,
        trains_head=peft == "none" or "head.weight" in extra, frozen_bytes=compute_bytes,
        compute_bytes=compute_bytes, optim=optim, grad_cp=settings.model.grad_cp, chunk_ctx=settings.batches.chunk_ctx,
        n_tokens=windows * ctx_len + int(pair_sizes[:, 0].sum()), n_rows=windows * ctx_len + int(pair_sizes[:, 1].sum()),
        n_segments=windows + int(pair_sizes[:, 2].sum()),
        accumulates=accumulates,
        on_gpu=on_gpu, wkv_backend=devices.wkv_backend if devices.wkv_backend != "auto" else _fastest(model.shape.version, on_gpu),
        keeps_heap=not on_gpu and devices.cpu_malloc == 1, trained_bytes=2 if zero_stage and devices.precision == "fp16" else 4,
        ddp=uses_ddp(devices), zero_stage=zero_stage, offload="offload" in strategy, n_bucket=devices.ds_bucket_mb * 1_000_000,
        quant=settings.tuning.quant, n_projections=sum(weight.numel() for weight in _projections(model)),
        world_size=devices.world_size, file_bytes=0 if on_gpu else _file_bytes(settings.model.load_model, n_weights),
    )  # fmt: skip
    return plan, words


def _largest_micro_batch(settings: RunSettings) -> tuple[int, np.ndarray, str, bool]:
    """Its corpus windows; tokens, scored rows and segments [n, 3] of its trees; a description of both; and whether a step has other
    micro-batches."""
    batch_tokens, ctx_len, length = settings.batches.batch_tokens, settings.data.ctx_len, settings.length
    n = length.samples * length.accumulated if batch_tokens else settings.batches.micro_bsz
    windows, accumulates = n if settings.objective.uses_corpus else 0, length.accumulated > 1
    sizes, what = _longest_pairs(settings, n) if settings.objective.uses_pairs else (np.zeros((0, 3), dtype=np.int64), "")
    if batch_tokens:
        accumulates = windows * ctx_len + int(sizes[:, 0].sum()) > batch_tokens * settings.devices.world_size
        # More of a window's rows are scored, so windows come first. Synthetic pairs may be longer than the real ones will be.
        windows = min(windows, batch_tokens // ctx_len)
        fitting = _fitting(sizes, batch_tokens - windows * ctx_len)
        sizes = fitting if windows or len(fitting) else sizes[:1]
    words = [f"{windows} x {ctx_len:,} tokens of corpus"] if windows else []
    words += [what.format(len(sizes))] if len(sizes) else []
    return windows, sizes, " and ".join(words), accumulates


def _fitting(sizes: np.ndarray, room: int) -> np.ndarray:
    """The first trees that fit into this many tokens."""
    taken = []
    for size in sizes:
        if size[0] <= room:
            taken.append(size)
            room -= int(size[0])
    return np.array(taken, dtype=np.int64).reshape(-1, 3)


def _tuned(settings: TuningSettings, model: RWKV) -> tuple[int, tuple[str, ...]]:
    """How many parameters --peft adds to the model, and the weights that it trains in addition."""
    shape = model.shape
    if settings.peft == "none":
        return 0, ()
    if settings.peft == "state":
        return shape.n_layer * shape.dim_att * shape.head_size, ()
    if settings.peft_load and not Path(settings.peft_load).exists():
        log.warning("--peft_load %s does not exist: its rank and targets are taken from the flags", settings.peft_load)
    elif settings.peft_load:
        saved = read_adapter(settings.peft_load)
        return sum(x.numel() for x in saved.split()[0].values()), tuple(saved.extra)
    plan = adapter_of(model, settings)
    sides = [model.get_parameter(f"{name}.weight").shape for name in plan.modules]
    n_magnitudes = sum(n_out for n_out, _ in sides) if settings.peft == "dora" else 0
    return plan.r * sum(map(sum, sides)) + n_magnitudes, plan.extra


def _fastest(version: str, on_gpu: bool) -> str:
    if not on_gpu:
        return "cpu"
    return "cuda" if offers(version, "cuda") else "chunked"


def _file_bytes(checkpoint: str, n_weights: int) -> int:
    """The size of a checkpoint's file, also of one that does not exist: the official ones are in bf16."""
    if not checkpoint:
        return 0
    return Path(checkpoint).stat().st_size if Path(checkpoint).exists() else 2 * n_weights


def _longest_pairs(settings: RunSettings, n: int) -> tuple[np.ndarray, str]:
    """Tokens, scored rows and segments [n, 3] of the n longest trees, and a description with a placeholder for their number."""
    path, ctx_len = settings.data.dpo_train_file, settings.data.ctx_len
    if not Path(path).is_file():
        log.warning("--dpo_train_file %s does not exist: pairs are assumed to be --ctx_len long, with half of it for the answer", path)
        half = max(ctx_len // 2, 1)
        return np.tile([half + 2 * half, 2 * half, 3], (n, 1)), f"{{}} synthetic pairs of {half} + {half} or {half} tokens"
    pairs = open_pairs("dpo_train_file", path)
    check_fits(settings.batches.batch_tokens, pairs, path)
    sizes = _tree_sizes(pairs)
    longest = sizes[np.argsort(sizes[:, 0], kind="stable")[::-1]]
    # If there are fewer than a micro-batch holds, they are repeated.
    what = "pairs" if pairs.n_trees == len(pairs) else f"trees of {len(pairs):,} pairs"
    return np.resize(longest, (n, 3)), f"the {{}} longest of {len(sizes):,} {what}"


def _tree_sizes(pairs: PairSet) -> np.ndarray:
    """Tokens, scored rows and segments [m, 3]: prompts and answers once, without each answer's last token, which is only a target."""
    n_rows = len(pairs.offsets) - 1
    numbers = pairs.tree_numbers[:, None] * n_rows
    answers = np.unique(numbers + pairs.rows[:, 1:])
    n_answers = np.bincount(answers // n_rows, minlength=pairs.n_trees)
    n_scored = np.bincount(answers // n_rows, np.diff(pairs.offsets)[answers % n_rows], minlength=pairs.n_trees).astype(np.int64)
    n_prompts = np.bincount(np.unique(numbers[:, 0] + pairs.rows[:, 0]) // n_rows, minlength=pairs.n_trees)
    return np.stack([pairs.tree_tokens - n_answers, n_scored, n_answers + n_prompts], axis=1)


def _projections(model: RWKV) -> list[torch.Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, Linear)]


def _model_without_memory(shape: ModelShape) -> RWKV:
    with torch.device("meta"):
        return empty_model(shape, choose_backend(shape.version, "reference", torch.device("cpu")).wkv, torch.float32)
