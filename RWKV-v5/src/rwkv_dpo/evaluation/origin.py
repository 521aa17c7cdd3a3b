"""What the run folder that a checkpoint lies in tells of it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.held_out import check_held_out, refuse_mixture
from rwkv_dpo.data.pair_files import load_pairs
from rwkv_dpo.data.pairs import PairSet, content_sha256
from rwkv_dpo.objective.losses import Mixture, mixture_of_flags


def run_of(checkpoint: str | Path) -> Mapping[str, Any]:
    """The settings of the preference training whose folder holds a checkpoint, an adapter or a state: its config.json. Empty where
    there is none."""
    try:
        settings = json.loads((Path(checkpoint).parent / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    # Other programs have files of that name.
    is_ours = isinstance(settings, dict) and settings.get("dpo") == 1 and isinstance(settings.get("dpo_train_file"), str)
    return settings if is_ours and _is_beta(settings.get("dpo_beta")) else {}


def objectives(runs: Sequence[Mapping[str, Any]]) -> list[Mixture]:
    """The preference losses of each run; for a checkpoint without a run, which stands beside others to be compared, those of the first
    that is known. All of whole answers: pair files know no other sums."""
    first: Mapping[str, Any] = next((run for run in runs if run), {})
    return [mixture_of_flags({**(run or first), "dpo_ld_alpha": 1.0}) for run in runs]


def check_not_trained_on(pairs: PairSet, name: str, run: Mapping[str, Any], checkpoint: str) -> str:
    """What to warn of when pairs are among those that a checkpoint was trained with, "" when they aren't or nothing is known.
    InputError when they come from another preparation of the same preferences."""
    content = run.get("content")
    if not isinstance(content, dict):
        return ""
    trained_name = f"{run['dpo_train_file']}, which {checkpoint} was trained with,"
    refuse_mixture(pairs.header, content, name, trained_name)
    try:
        trained = load_pairs(run["dpo_train_file"])
    except InputError:
        return ""
    if content.get("dpo_train_file") != content_sha256(trained, run.get("dpo_ref") == "file"):
        return ""  # another file by now
    try:
        return check_held_out(pairs, trained, name, trained_name)
    except InputError as all_of_them:
        return str(all_of_them)


def doubts_of(pairs: Mapping[str, PairSet], checkpoints: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to warn of: pairs, by the flag and name of their file, that are not scored, or are not held out from the run of a checkpoint.
    InputError for those of another preparation."""
    found = []
    for name, of_file in pairs.items():
        found += [check_not_trained_on(of_file, name, *known) for known in zip(runs, checkpoints, strict=True)]
        if not of_file.is_scored:
            found.append(f"{name}: not scored by a reference, so that rewards are left out; prepare_pairs.py scores pairs")
    return [doubt for doubt in found if doubt]


def _is_beta(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
