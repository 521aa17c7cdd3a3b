"""Parameter groups by name, and the rates they get."""

import torch
from rwkv_dpo.optimizer.adamw import build_optimizer, lr_scale, set_rates
from rwkv_dpo.run.settings import settings_of

NAMES = {
    "blocks.0.att.time_decay": (2, 8),
    "blocks.0.att.time_faaaa": (2, 8),
    "blocks.0.att.time_mix_k": (1, 1, 16),
    "blocks.0.ln1.weight": (16,),
    "blocks.0.att.key.weight": (16, 16),
    "emb.weight": (50, 16),
    "blocks.0.att.time_maa_w1": (16, 20),
    "blocks.0.att.time_decay_w2": (4, 16),
    "blocks.0.att.w0": (1, 1, 16),
    "blocks.0.att.w1": (16, 4),
    "blocks.0.att.g2": (4, 16),
    "blocks.0.att.r_k": (2, 8),
    "blocks.0.att.x_k": (1, 1, 16),
}


def rates(**settings):
    run = settings_of({"lr_init": 1e-3, "lr_final": 1e-3, **settings})
    parameters = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in NAMES.items()}
    optimizer = build_optimizer(parameters.items(), run.optimizer)
    set_rates(optimizer, run.schedule, run.length.first_step, steps_since_start=0)
    by_id = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(p)] for name, p in parameters.items()}


def test_time_decay_learns_twice_as_fast_and_only_matrices_decay():
    got = rates(weight_decay=0.1)
    assert got["blocks.0.att.time_decay"] == (2e-3, 0.0)
    assert got["blocks.0.att.time_faaaa"] == (1e-3, 0.0)
    assert got["blocks.0.att.time_mix_k"] == (1e-3, 0.0)
    assert got["blocks.0.ln1.weight"] == (1e-3, 0.0)
    assert got["blocks.0.att.key.weight"] == (1e-3, 0.1)
    assert got["emb.weight"] == (1e-3, 0.1)
    # Of RWKV-6 and RWKV-7: low-rank parts and r_k are matrices that don't decay.
    assert got.pop("blocks.0.att.w0") == (2e-3, 0.0)
    for name in ("time_maa_w1", "time_decay_w2", "w1", "g2", "r_k", "x_k"):
        assert got[f"blocks.0.att.{name}"] == (1e-3, 0.0), name


def test_layerwise_lr_0_gives_one_rate():
    assert {lr for lr, _ in rates(layerwise_lr=0).values()} == {1e-3}


def test_scales_are_rwkv_lms():
    assert lr_scale("blocks.3.att.time_first", 0) == 3
    assert lr_scale("blocks.3.att.time_decay", 2) == 5
    assert lr_scale("blocks.3.ffn.time_mix_k", 2) == 5
    assert lr_scale("blocks.3.ffn.key.weight", 2) == 1
    assert lr_scale("blocks.3.att.time_maa_x", 2) == 5
    assert lr_scale("blocks.3.att.time_maa_w1", 2) == lr_scale("blocks.3.att.time_decay_w2", 2) == 1
    assert lr_scale("blocks.3.att.w0", 0) == lr_scale("blocks.3.att.w0", 2) == 2
