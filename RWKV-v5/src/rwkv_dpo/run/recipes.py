"""--recipe and --epochs: settings that follow from the purpose of a run, the amount of its data and the width of its model."""

import logging
from collections.abc import Mapping
from typing import Any

from pytorch_lightning.utilities import rank_zero_only

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.devices.device import pick_device
from rwkv_dpo.run.data import RunData
from rwkv_dpo.run.model import expected_shape
from rwkv_dpo.run.rules import check, check_trains
from rwkv_dpo.run.settings import RunSettings

log = logging.getLogger(__name__)

# Chosen by benchmarks/sweep_recipes.py (benchmarks/results/recipes_demo.json), at this width.
_SWEPT_WIDTH = 128
_PREFERENCE = {"dpo": 1, "dpo_beta": 0.1, "micro_bsz": 4, "epochs": 2}
_RECIPES: Mapping[str, Mapping[str, Any]] = {
    "dpo": {**_PREFERENCE, "lr_init": 2.5e-4},
    "lora": {**_PREFERENCE, "peft": "lora", "lr_init": 5e-4},
    "state": {**_PREFERENCE, "peft": "state", "lr_init": 1.0},
    "pretrain": {"dpo": 0, "micro_bsz": 4, "epochs": 1, "lr_init": 3e-3},
}
# How learning rates fall with the width, wider models being those that have learned more. Squared, the rate of the sweep becomes 4e-6 at
# 1,024 (the original has 5e-6 there) and 2e-7 at 4,096 (Zephyr: 5e-7, Tunstall et al. 2023, arXiv:2310.16944); adapters go with it.
# How learning rates scale with the width; wider models have learned more before. Squared, the rate of the sweep becomes 4e-6 at 1,024 (the
# original has 5e-6 there) and 2e-7 at 4,096 (Zephyr: 5e-7, Tunstall et al. 2023, arXiv:2310.16944); adapters follow the same rule.
# Pre-training scales as RWKV-LM's rates do, 6e-4 at 768. A state has no width except that of its heads.
_FALLS_WITH_WIDTH = {"dpo": 2, "lora": 2, "state": 0, "pretrain": 1}
# What the rate decays to, and the share of the steps that are warm-up.
_FALLS_TO, _WARMUP = 0.2, 0.06
# With pairs, if a corpus is given. Without one, weights learn from pairs alone, and at the same rate would unlearn everything else.
_CORPUS_RATIO, _ALONE = 0.8, 0.2
# Evaluations per run.
_EVALUATIONS = 8


def with_recipe(settings: RunSettings, given: frozenset[str]) -> RunSettings:
    """The settings completed with those of --recipe that depend on model and machine only, except for the flags that were given; prints
    which they are. Raises InputError."""
    return _changed(settings, _fixed(settings, given)) if settings.general.recipe else settings


def with_length(settings: RunSettings, given: frozenset[str], data: RunData) -> RunSettings:
    """The settings with the epochs of --epochs, and with those of --recipe that depend on the number of steps; prints which they are.
    Raises InputError."""
    lengths = _passes(settings, given, data)
    more = _of_length(settings.with_flags(**lengths), given) if settings.general.recipe else {}
    return _changed(settings, {**lengths, **more})


def _changed(settings: RunSettings, chosen: dict[str, Any]) -> RunSettings:
    if not chosen:
        return settings
    settings, recipe = settings.with_flags(**chosen), settings.general.recipe
    told = " ".join(f"--{name} {value:g}" if isinstance(value, float) else f"--{name} {value}" for name, value in chosen.items())
    rank_zero_only(log.info)("%s: %s", f"--recipe {recipe}" if recipe else f"--epochs {settings.epochs.epochs}", told)
    check(settings)
    check_trains(settings)
    return settings


def _fixed(settings: RunSettings, given: frozenset[str]) -> dict[str, Any]:
    """What depends on the model and the machine only."""
    recipe = dict(_RECIPES[settings.general.recipe])
    accelerator = settings.devices.accelerator if "accelerator" in given else "auto"
    # A dry run may be for a GPU that doesn't exist here.
    is_named = settings.general.dry_run and accelerator != "auto"
    on_gpu = accelerator != "cpu" if is_named else pick_device(accelerator, "--accelerator").type == "cuda"
    recipe |= {"accelerator": "gpu" if on_gpu else "cpu", "precision": "bf16" if on_gpu else "fp32", "epoch_save": 1}
    width = max(expected_shape(settings, given).n_embd, _SWEPT_WIDTH)
    recipe["lr_init"] *= (_SWEPT_WIDTH / width) ** _FALLS_WITH_WIDTH[settings.general.recipe]
    has_corpus = bool(settings.data.data_file)
    if recipe["dpo"] and not has_corpus and settings.general.recipe != "state":
        recipe["lr_init"] *= _ALONE
    lr_init = settings.optimizer.lr_init if "lr_init" in given else recipe["lr_init"]
    recipe["lr_final"] = lr_init * _FALLS_TO
    if recipe["dpo"] and has_corpus:
        recipe["dpo_general_corpus_ratio"] = _CORPUS_RATIO
    if given & {"epoch_steps", "epoch_count"}:
        del recipe["epochs"]
    return {name: value for name, value in recipe.items() if name not in given}


def _passes(settings: RunSettings, given: frozenset[str], data: RunData) -> dict[str, Any]:
    """epoch_steps and epoch_count for --epochs passes over the pairs, or the corpus."""
    n_passes, accumulated = settings.epochs.epochs, settings.epochs.accumulate_grad_batches
    if not n_passes:
        return {}
    for name in ("epoch_steps", "epoch_count"):
        if name in given:
            refuse(f"--epochs {n_passes}: --{name} sets the same; give either --epochs, or --epoch_steps and --epoch_count")
    n_samples = 0
    if data.pairs is not None:
        n_samples = data.pairs.n_trees
    elif data.corpus is not None:
        n_samples = (data.corpus.n_tokens - 1) // settings.data.ctx_len
    a_step = settings.length.samples * accumulated
    return {"epoch_steps": -(-n_samples // a_step) * accumulated, "epoch_count": n_passes}


def _of_length(settings: RunSettings, given: frozenset[str]) -> dict[str, Any]:
    """What depends on the number of steps."""
    n_steps, data = settings.length.total_steps, settings.data
    chosen: dict[str, Any] = {"warmup_steps": round(_WARMUP * n_steps)}
    if data.dpo_valid_file or data.valid_data_file:
        chosen |= {"eval_every": max(n_steps // _EVALUATIONS, 1), "keep_best": "loss_dpo" if data.dpo_valid_file else "corpus_loss"}
    return {name: value for name, value in chosen.items() if name not in given}
