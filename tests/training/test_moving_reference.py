"""--dpo_sync_ref: a reference that follows the policy."""

import functools
import json
import math
from dataclasses import replace

import pytest
import runs
import torch
from runs import run_to
from rwkv_dpo.batches import loader
from rwkv_dpo.commands import train
from rwkv_dpo.data.pair_files import load_pairs
from rwkv_dpo.evaluation.scoring import score_pairs
from rwkv_dpo.model.checkpoint import load_model, save_weights
from rwkv_dpo.run import trainer

# Every micro-batch holds all ten pairs, so that a step's metrics are means over the set.
ALL = {"dpo_ref": "recompute", "data_file": None, "dpo_general_corpus_ratio": 0, "micro_bsz": 10, "lr_init": 1e-2, "lr_final": 1e-2}
flags = functools.partial(runs.flags, **ALL, dpo_valid_file="DATA/valid.save", eval_every=1)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores_of(weights, data, folder, name):
    """Means over the pairs of a file under weights, scored by themselves."""
    save_weights(weights, folder / "mean.pth")
    model = load_model(str(folder / "mean.pth"), device=torch.device("cpu"), compute_dtype=torch.float32)
    return score_pairs(model, load_pairs(data / f"{name}.save"), 1000).mean(0)


def test_the_reference_is_the_mean_of_policy_and_reference(data, tmp_path):
    train.main(flags(data, tmp_path / "out", dpo_sync_ref=2, dpo_sync_alpha=0.4, epoch_steps=5, epoch_count=1))
    start, weights = torch.load(data / "model.pth"), []
    for n_steps in (2, 4):
        own = {"epoch_steps": n_steps, "epoch_count": 1, "dpo_sync_ref": 2, "dpo_sync_alpha": 0.4}
        train.main(flags(data, tmp_path / f"short{n_steps}", **own))
        policy = torch.load(tmp_path / f"short{n_steps}" / "rwkv-final.pth")
        before = weights[-1] if weights else start
        weights.append({name: 0.4 * policy[name] + 0.6 * before[name].float() for name in policy})
    held_out, steps = lines(tmp_path / "out" / "valid.jsonl"), lines(tmp_path / "out" / "metrics.jsonl")
    for records, name, moves in ((held_out, "valid", {2: 0, 3: 0, 4: 1, 5: 1}), (steps, "train", {3: 0, 4: 0, 5: 1})):
        for step, number in moves.items():
            (record,) = [record for record in records if record["step"] == step]
            want = scores_of(weights[number], data, tmp_path, name)
            assert [record["ref_logps/chosen"], record["ref_logps/rejected"]] == pytest.approx(want, abs=1e-4), (name, step)
    first = scores_of(start, data, tmp_path, "train")
    assert [steps[1][f"ref_logps/{side}"] for side in ("chosen", "rejected")] == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("peft", ["none", "lora", "state"])
def test_a_reference_that_is_the_policy_has_no_margin(data, tmp_path, peft):
    train.main(flags(data, tmp_path, dpo_sync_ref=3, dpo_sync_alpha=1.0, epoch_steps=4, epoch_count=1, peft=peft))
    by_step = {record["step"]: record for record in lines(tmp_path / "valid.jsonl")}
    assert by_step[3]["loss_dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(by_step[3]["rewards/margins"]) < 1e-5 < abs(by_step[2]["rewards/margins"])


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_ends_with_the_same_bytes(data, tmp_path, step):
    own = {"dpo_sync_ref": 2, "dropout": 0.1, "micro_bsz": 4}
    train.main(flags(data, tmp_path / "whole", **own))
    run_to(step, flags(data, tmp_path / "parts", **own))
    train.main(flags(data, tmp_path / "parts", **own))
    whole, parts = (lines(tmp_path / name / "valid.jsonl") for name in ("whole", "parts"))
    assert whole == parts
    assert (tmp_path / "whole" / "rwkv-final.pth").read_bytes() == (tmp_path / "parts" / "rwkv-final.pth").read_bytes()


def test_batches_that_were_made_before_the_move_know_of_it(data, tmp_path, monkeypatch):
    """On a GPU a thread is one micro-batch ahead."""
    train.main(flags(data, tmp_path / "cpu", dpo_sync_ref=1))
    monkeypatch.setattr(trainer, "build_loader", lambda *arguments: replace(loader.build_loader(*arguments), is_ahead=True))
    train.main(flags(data, tmp_path / "ahead", dpo_sync_ref=1))
    assert (tmp_path / "cpu" / "rwkv-final.pth").read_bytes() == (tmp_path / "ahead" / "rwkv-final.pth").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2"])
def test_two_processes_have_the_reference_of_one(data, tmp_path, lives, strategy):
    own = {"dpo_sync_ref": 2, "adam_eps": 1e-5}
    processes = lives.start(flags(data, tmp_path / "two", **own, devices=2, strategy=strategy, micro_bsz=5), tmp_path / "log", world_size=2)
    assert lives.end(processes, tmp_path / "log") == [0, 0], (tmp_path / "log").read_text()
    train.main(flags(data, tmp_path / "one", **own | {"micro_bsz": 10}))
    for two, one in zip(*(lines(tmp_path / name / "valid.jsonl") for name in ("two", "one")), strict=True):
        # Gradients that are rounded by 1e-7 move a weight by up to 1e-2 * 1e-7 / adam_eps in a step.
        names = ("ref_logps/chosen", "ref_logps/rejected", "logps/chosen", "logps/rejected")
        assert [two[name] for name in names] == pytest.approx([one[name] for name in names], abs=1e-4)
