"""Runs beside a base in 8 or 4 bits: where they begin, what they save, and what reads it."""

import json
import re

import numpy as np
import pytest
import torch
from runs import flags, run_to
from rwkv_dpo.commands import evaluate, export, train
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.evaluation.reference import score_with_checkpoint
from rwkv_dpo.evaluation.scoring import score_pairs
from rwkv_dpo.files.tensor_files import read_safetensors
from rwkv_dpo.model.checkpoint import load_model, read_weights
from rwkv_dpo.tuning.adapter_files import WEIGHTS, read_adapter
from rwkv_dpo.tuning.tuning import load_tuned
from test_train import run

LORA = {"lora_r": 4, "lora_alpha": 8}


def loaded(data, tuned=None, quant="none"):
    held = "none" if tuned else quant
    model = load_model(data / "model.pth", device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="cpu", quant=held)
    return load_tuned(model, tuned, quant=quant) if tuned else model


@pytest.fixture(scope="module")
def scored(data, tmp_path_factory):
    """The training pairs as the base in 4 bits scores them."""
    folder = tmp_path_factory.mktemp("scored")
    pairs = load_pairs(data / "train.save")
    how = {"device": "cpu", "precision": "fp32", "batch_tokens": 100, "wkv_backend": "cpu"}
    save_pairs(folder / "nf4.save", score_with_checkpoint(pairs, data / "model.pth", folder, quant="nf4", **how))
    return folder / "nf4.save"


@pytest.mark.parametrize(("method", "form", "precision"), [
    ("lora", "nf4", "fp32"), ("dora", "int8", "bf16"), ("pissa", "nf4", "bf16"), ("rslora", "int8", "fp32"), ("state", "nf4", "bf16"),
    ("state", "int8", "fp32"),
])  # fmt: skip
def test_the_reference_is_the_base_as_it_is_held(data, tmp_path, caplog, method, form, precision):
    changes = {} if method == "state" else LORA
    with caplog.at_level("INFO"):
        run(data, tmp_path, peft=method, quant=form, dpo_ref="recompute", epoch_count=1, precision=precision, **changes)
    (margin,) = re.findall(r"step 0: mean \|margin\| of 8 short pairs (\S+) nats", caplog.text)
    # The same model in the same arithmetic, in batches of other pairs: bf16 rounds to 2^-8.
    assert float(margin) <= (1e-5 if precision == "fp32" else 0.02)
    assert "not the one that scored" not in caplog.text
    assert re.search(rf"--peft {method}: trains .* are frozen, 24,576 of them in 0\.0 MB \(--quant {form}\)", caplog.text)


def test_scores_of_another_form_of_the_same_file_are_told_apart(data, tmp_path, scored, caplog):
    def warnings(name, **changes):
        caplog.clear()
        run(data, tmp_path / name, peft="lora", epoch_steps=1, epoch_count=1, **changes)
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    right = warnings("right", quant="nf4", dpo_train_file=scored)
    assert not any("scored" in line for line in right)
    for name, as_was, as_now, changes in (
        ("as they are", "none", "nf4", {"quant": "nf4"}), ("in 4 bits", "nf4", "none", {"dpo_train_file": scored}),
    ):  # fmt: skip
        by_header, by_margins = (line for line in warnings(name, **changes) if "scored" in line)
        assert f"was scored with --quant {as_was}, training has --quant {as_now}, which is a different model" in by_header
        assert "the starting model is not the one that scored dpo_train_file" in by_margins


def read_weights_of(path):
    return read_safetensors(path)[0] if path.suffix == ".safetensors" else read_weights(path)


@pytest.mark.parametrize(("method", "form"), [("lora", "nf4"), ("pissa", "int8"), ("dora", "nf4"), ("state", "int8")])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(data, tmp_path, method, form):
    own = {"peft": method, "quant": form, "dpo_ref": "recompute", **({} if method == "state" else {**LORA, "lora_dropout": 0.1})}
    train.main(flags(data, tmp_path / "whole", **own))
    run_to(3, flags(data, tmp_path / "stopped", **own))
    assert not list((tmp_path / "stopped").glob("*-final*"))
    train.main(flags(data, tmp_path / "stopped", **own))
    name = "state-final.pth" if method == "state" else f"adapter-final/{WEIGHTS}"
    # Of the tensors: safetensors writes its metadata in any order.
    ends = [read_weights_of(tmp_path / folder / name) for folder in ("whole", "stopped")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    whole, stopped = ((tmp_path / folder / "metrics.jsonl").read_text().splitlines() for folder in ("whole", "stopped"))
    assert [json.loads(line)["loss"] for line in whole] == [json.loads(line)["loss"] for line in stopped]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train.main(flags(data, folder, peft="lora", quant="nf4", dpo_ref="recompute", lr_init=1e-2, lr_final=1e-2, **LORA))
    return folder / "adapter-final"


def test_export_merges_into_the_base_as_it_is_in_its_file(data, tmp_path, trained):
    export.main([str(x) for x in ("--load_model", data / "model.pth", "--peft_load", trained, "--out", tmp_path / "merged.pth")])
    base, merged, adapter = read_weights(data / "model.pth"), read_weights(tmp_path / "merged.pth"), read_adapter(trained)
    assert merged.keys() == base.keys()
    moved = 0
    for name, weight in base.items():
        a, b = (adapter.tensors.get(f"{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
        delta = torch.zeros(()) if a is None else 8 / 4 * b.double() @ a.double()
        moved += bool(delta.abs().max() > 1e-3)
        torch.testing.assert_close(merged[name].double(), weight.double() + delta, rtol=0, atol=1e-6)
    assert moved == len(adapter.modules)


def test_evaluate_reads_the_base_as_it_is_or_in_that_form(data, tmp_path, trained, scored):
    pairs = load_pairs(scored)
    for quant in ("none", "nf4"):
        arguments = ["--load_model", data / "model.pth", "--peft_load", trained, "--pairs", scored, "--quant", quant, "--device", "cpu"]
        evaluate.main([str(x) for x in (*arguments, "--dpo_beta", 1, "--out", tmp_path / f"{quant}.json")])
        found = [report["rewards/margins"] for report in json.loads((tmp_path / f"{quant}.json").read_text())]
        for report, tuned in zip(found, (None, trained), strict=True):
            off = score_pairs(loaded(data, tuned, quant), pairs, 8192) - pairs.ref_logps
            assert report == pytest.approx(float((off[:, 0] - off[:, 1]).mean()), abs=1e-4)
    assert found[0] == pytest.approx(0, abs=1e-5)
    plain = json.loads((tmp_path / "none.json").read_text())
    assert abs(plain[0]["rewards/margins"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_1", "deepspeed_stage_2"])
def test_strategies_leave_what_is_held_alone(data, tmp_path, lives, strategy):
    """In processes of their own: each would leave its address in the environment."""
    own = {"peft": "lora", "quant": "nf4", "dpo_ref": "recompute", "epoch_count": 1, "adam_eps": 1e-5, **LORA}
    want = [r["loss"] for r in run(data, tmp_path / "plain", **own)]
    lives.trained(flags(data, tmp_path / "out", strategy=strategy, **own), tmp_path / "log")
    got = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert got == pytest.approx(want, rel=1e-5)


def test_the_start_of_a_pissa_comes_back_from_its_folder(data, tmp_path):
    """What it took out of the matrices is taken out again before the rest is held in fewer bits."""
    train.main(flags(data, tmp_path / "out", peft="pissa", quant="nf4", dpo_ref="recompute", epoch_count=1, **LORA))
    pairs = load_pairs(data / "train.save")
    at_start = load_pairs(tmp_path / "out" / "reference.save").ref_logps[: len(pairs)]
    found = score_pairs(loaded(data, tmp_path / "out" / "adapter-init", "nf4"), pairs, 8192)
    np.testing.assert_allclose(found, at_start, rtol=1e-5)
