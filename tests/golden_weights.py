"""Rebuilds the weights and data behind the golden files: numbers that the original's own training step produced."""

import json
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


def golden_weights(shapes: dict[str, list[int]], seed: int) -> dict[str, torch.Tensor]:
    """Weights by the recipe in the golden files' description: one generator, keys in sorted order."""
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy(_draw(rng, name, shapes[name]).astype(np.float32)) for name in sorted(shapes)}


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
