"""The estimate of a run's memory against the peak of torch's allocator, under DeepSpeed and without, on one GPU that is not there."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from fake_gpu import run_on_fake_gpu, unusable_because
from runs import flags
from rwkv_dpo.data.pair_files import save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape

pytestmark = [pytest.mark.slow, pytest.mark.skipif(unusable_because() != "", reason=unusable_because())]

# 28.9 M weights.
SHAPE = ModelShape(n_layer=6, n_embd=512, dim_att=512, dim_ffn=1792, vocab_size=8192)
SHAPES = {
    "5": SHAPE, "6": replace(SHAPE, version="6", ranks=(160, 64)),
    "7": replace(SHAPE, version="7", ranks=(64, 64, 32, 128), dim_ffn=2048),
}  # fmt: skip
FULL, CP, LORA, STATE = {}, {"grad_cp": 1}, {"grad_cp": 1, "peft": "lora"}, {"grad_cp": 1, "peft": "state"}
ZERO = "deepspeed_stage_"
RUNS = {
    "auto": {}, "auto, grad_cp": CP, "auto, LoRA": LORA, "auto, bf16 moments": {"grad_cp": 1, "optim": "adamw_bf16state"},
    "stage 1, grad_cp": {"strategy": f"{ZERO}1", **CP},
    "stage 1, accumulated": {"strategy": f"{ZERO}1", "accumulate_grad_batches": 2, "epoch_steps": 4, **CP},
    "stage 2": {"strategy": f"{ZERO}2"}, "stage 2, grad_cp": {"strategy": f"{ZERO}2", **CP},
    "stage 2, small buckets": {"strategy": f"{ZERO}2", "ds_bucket_mb": 10},
    "stage 2, accumulated": {"strategy": f"{ZERO}2", "accumulate_grad_batches": 2, "epoch_steps": 4, **CP},
    "stage 2, chunks": {"strategy": f"{ZERO}2", "chunk_ctx": 256, "ds_bucket_mb": 10},
    "stage 2, fp16": {"strategy": f"{ZERO}2", "precision": "fp16", **CP},
    "stage 2, LoRA": {"strategy": f"{ZERO}2", **LORA}, "stage 2, LoRA without grad_cp": {"strategy": f"{ZERO}2", "peft": "lora"},
    "stage 2, state": {"strategy": f"{ZERO}2", **STATE},
    "stage 3": {"strategy": f"{ZERO}3"}, "stage 3, grad_cp": {"strategy": f"{ZERO}3", **CP},
    "stage 2, offload": {"strategy": f"{ZERO}2_offload"}, "stage 2, offload, LoRA": {"strategy": f"{ZERO}2_offload", **LORA},
    "stage 3, offload": {"strategy": f"{ZERO}3_offload", **CP},
    **{f"RWKV-{version}": {"load_model": f"DATA/{version}.pth"} for version in "67"},
    **{f"RWKV-{version}, grad_cp, LoRA": {"load_model": f"DATA/{version}.pth", **LORA} for version in "67"},
}  # fmt: skip


@pytest.fixture(scope="module")
def peaks(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("peaks")
    rng = np.random.default_rng(0)
    for version, shape in SHAPES.items():
        weights = random_model(shape, torch.float32).state_dict()
        save_weights({name: weight.bfloat16() for name, weight in weights.items()}, folder / f"{version}.pth")
    rng.integers(1, SHAPE.vocab_size, 40_000).astype("<u2").tofile(folder / "corpus.bin")
    pairs = [tuple(rng.integers(1, SHAPE.vocab_size, n) for n in (256, 200, 150)) for _ in range(4)]
    save_pairs(folder / "train.save", pack_pairs(pairs, np.full((4, 2), -2000.0)))
    own = {"accelerator": "gpu", "precision": "bf16", "ctx_len": 1024, "micro_bsz": 1, "epoch_steps": 2, "epoch_count": 1, "epoch_save": 0}
    own |= {"wkv_backend": "cuda", "load_model": "DATA/5.pth"}
    runs = {name: flags(folder, folder / name, **{**own, **changes}) for name, changes in RUNS.items()}
    (folder / "runs.json").write_text(json.dumps(runs))
    done = run_on_fake_gpu(Path(__file__).parents[1] / "peaks_on_fake_gpu.py", folder / "runs.json", folder / "logs")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", RUNS)
def test_the_estimate_is_within_a_tenth_of_the_allocators_peak(peaks, name):
    assert "fault" not in peaks[name], peaks[name]["fault"]
    estimated, measured = sum(peaks[name]["estimated"].values()), peaks[name]["measured"]
    assert estimated == pytest.approx(measured, rel=0.1), {part: f"{n / 1e6:.1f} MB" for part, n in peaks[name]["estimated"].items()}


def test_deepspeed_takes_little_more_than_no_strategy_where_little_is_trained(peaks):
    """A LoRA's 2 M numbers: 16 bytes each for masters, a bucket, and gradients on their way; 4 more for another's rounding."""
    assert peaks["stage 2, LoRA"]["measured"] < peaks["auto, LoRA"]["measured"] + 20 * 2_064_384
