"""The estimate of runs beside a base in 8 or 4 bits, against what they hold and torch's count of what a step takes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.batches.micro_batch import collate
from rwkv_dpo.kernels.backends import choose_backend
from rwkv_dpo.memory.estimate import Plan, alternatives, estimate, total
from rwkv_dpo.memory.frozen import while_quantizing
from rwkv_dpo.model.linear import Linear
from rwkv_dpo.model.quantized import FORMS, quantized
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.objective.objective import objective
from rwkv_dpo.run.dry_run import dry_run
from rwkv_dpo.run.settings import settings_of
from rwkv_dpo.tuning.adapters import add_adapter, plan_adapter
from test_memory import SHAPE, peak_of

SHAPES = {"5": SHAPE, "6": replace(SHAPE, version="6"), "7": replace(SHAPE, version="7", dim_ffn=1024)}


def adapted(shape, quant, **options):
    wkv = choose_backend(shape.version, "cpu", torch.device("cpu")).wkv
    model = random_model(shape, torch.float32, wkv=wkv, **options)
    model.compute_dtype = torch.bfloat16
    n_projections = sum(module.weight.numel() for module in model.modules() if isinstance(module, Linear))
    add_adapter(model, plan_adapter(model, "lora", 8, 8, 0.0, "key,value,receptance", "", ""), quant=quant)
    return model, n_projections


def bytes_of(model) -> int:
    return sum(p.nbytes for p in model.parameters()) + sum(matrix.nbytes for matrix in quantized(model).values())


@pytest.mark.parametrize("quant", ["none", *FORMS])
@pytest.mark.parametrize(("version", "grad_cp", "window"), [
    ("5", "0", 300), ("5", "1", 300), ("5", "1", 40), ("6", "1", 100), ("7", "0", 100),
])  # fmt: skip
def test_the_estimate_is_within_15_percent_of_what_a_step_takes(quant, version, grad_cp, window):
    model, n_projections = adapted(SHAPES[version], quant, grad_cp=grad_cp)
    trained = [p for p in model.parameters() if p.requires_grad]
    n = sum(p.numel() for p in trained)
    batch = collate([np.random.default_rng(0).integers(1, 512, window + 1)], [], np.zeros((0, 2)))
    peak = bytes_of(model) + 8 * n + peak_of(lambda: objective(model, batch, dpo(0.1), 1.0)[0].backward())
    plan = Plan(
        shape=SHAPES[version], n_parameters=sum(p.numel() for p in model.parameters()) + (n_projections if quant != "none" else 0),
        n_trainable=n, trains_head=False, frozen_bytes=2, compute_bytes=2, optim="adamw", grad_cp=grad_cp, chunk_ctx=0, n_tokens=window,
        n_rows=window, n_segments=1, accumulates=False, on_gpu=False, wkv_backend="cpu", quant=quant, n_projections=n_projections,
    )  # fmt: skip
    assert total(plan) == pytest.approx(peak, rel=0.15)
    # RWKV-6's time_maa_w2 is fp32, a large part of a model as small as this.
    assert estimate(plan)["weights"] == pytest.approx(bytes_of(model), rel=0.1 if version == "6" else 0.03)


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_is_made_in_no_more_than_is_said(form):
    shape = ModelShape(1, 256, 256, 2048, 64)
    made = FORMS[form]((2048, 256))
    assert peak_of(lambda: made.copy_(torch.zeros(2048, 256, dtype=torch.bfloat16))) == pytest.approx(
        while_quantizing(shape, form) + 2 * 2048 * 256, rel=0.1
    )


def report(shape_flags, **changes):
    flags = {"dry_run": 1, "load_model": "none.pth", "peft": "lora", "dpo_train_file": "none.save", "precision": "bf16", "grad_cp": "1",
             "micro_bsz": 1, "ctx_len": 512, "accelerator": "gpu", "dpo_general_corpus_ratio": 0.0, **changes}  # fmt: skip
    return dry_run(settings_of(flags), ModelShape(**shape_flags))


LARGE = {"n_layer": 24, "n_embd": 2048, "dim_att": 2048, "dim_ffn": 7168, "vocab_size": 65536, "version": "5"}


def test_the_dry_run_of_1_5_b_says_what_is_saved():
    """The base: 1,308 M numbers in projections, 269 M in embedding and head, which stay in bf16."""
    found = {quant: float(report(LARGE, quant=quant).split("weights")[1].split()[0]) for quant in ("none", *FORMS)}
    rest = 4 * 31.9e6 / 1e9  # the adapter's own fp32
    base = {quant: weights - rest for quant, weights in found.items()}
    assert base["nf4"] / base["none"] <= 0.45
    assert base["int8"] / base["none"] <= 0.65
    lines = report(LARGE).splitlines()
    offered = {line.split("   ")[0].strip(): float(line.split()[-1]) for line in lines if "--quant" in line and "saves" in line}
    assert set(offered) == {"--quant int8", "--quant nf4"}
    assert 1.2 < offered["--quant int8"] < offered["--quant nf4"] < 2.0
    assert "--quant nf4" not in report(LARGE, quant="nf4")
    assert "--quant" not in report(LARGE, peft="none", load_model="")


def test_it_is_offered_where_something_is_frozen_alone():
    plan = Plan(
        shape=SHAPE, n_parameters=10**7, n_trainable=10**5, trains_head=False, frozen_bytes=2, compute_bytes=2, optim="adamw8bit",
        grad_cp="1", chunk_ctx=512, n_tokens=1, n_rows=1, n_segments=1, accumulates=False, on_gpu=True, wkv_backend="cuda",
        n_projections=9 * 10**6,
    )  # fmt: skip
    assert set(alternatives(plan, 0, 0)) == {"--quant int8", "--quant nf4"}
    assert set(alternatives(replace(plan, quant="int8"), 0, 0)) == {"--quant nf4"}
    assert alternatives(replace(plan, n_trainable=10**7), 0, 0).keys() & {"--quant int8", "--quant nf4"} == set()
