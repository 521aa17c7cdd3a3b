"""Rebuilds the weights and data behind the golden files: numbers that the original's own training step produced."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def load_golden(name: str) -> dict:
    path = GOLDEN / name
    if not path.exists():
        pytest.skip(f"golden file {name} is not here")
    return json.loads(path.read_text())


def golden_weights(golden: dict) -> dict[str, torch.Tensor]:
    """Weights by the recipe in the golden files' description, or the recipe that a file holds: one generator, keys in sorted order."""
    shapes, rng = golden["weight_shapes"], np.random.default_rng(golden["weight_seed"])
    rules = golden.get("weight_recipe", {}).get("rules")
    draw = _draw if rules is None else functools.partial(_draw_by, rules)
    return {name: torch.from_numpy(draw(rng, name, shapes[name]).astype(np.float32)) for name in sorted(shapes)}


def _draw_by(rules: list[list], rng: np.random.Generator, name: str, shape: list[int]) -> np.ndarray:
    """The first rule [regex, kind, p, q] whose regex is found in the name."""
    kind, p, q = next(rule[1:] for rule in rules if re.search(rule[0], name))
    if kind == "uniform":
        return rng.uniform(p, q, shape)
    scale = 1.0 if kind == "normal" else np.sqrt(shape[{"normal/sqrt(shape[0])": 0, "normal/sqrt(shape[-1])": -1}[kind]])
    return p + q * rng.standard_normal(shape) / scale


def _draw(rng: np.random.Generator, name: str, shape: list[int]) -> np.ndarray:
    last = name.rsplit(".", 1)[-1]
    is_norm = name.split(".")[-2].startswith("ln")
    if last == "time_decay":
        return rng.uniform(-6, 1, shape)
    if last.startswith(("time_mix", "time_maa")) and not last.endswith(("_w1", "_w2")):
        return rng.uniform(0, 1, shape)
    if is_norm:
        return 1 + 0.1 * rng.standard_normal(shape) if last == "weight" else 0.1 * rng.standard_normal(shape)
    if last == "time_faaaa":
        return 0.3 * rng.standard_normal(shape)
    if name == "emb.weight":
        return 0.5 * rng.standard_normal(shape)
    return rng.standard_normal(shape) / np.sqrt(shape[-1])
