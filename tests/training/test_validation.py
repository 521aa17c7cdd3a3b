"""Held-out pairs while a run lasts: when they are evaluated, and that the run knows nothing of it."""

import functools
import json
import math

import pytest
import runs
import torch
from runs import run_to
from rwkv_dpo.commands import train
from rwkv_dpo.training import validation
from rwkv_dpo.training.validation import drawn, interval
from safetensors.torch import load_file
from scipy.stats import binomtest

flags = functools.partial(runs.flags, dpo_valid_file="DATA/valid.save", dropout=0.1)  # two epochs of four steps


def read_all(path):
    """Tensors: what safetensors writes beside them has no fixed order."""
    weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    return {name: weight.tolist() for name, weight in weights.items()}


def held_out(folder):
    return [json.loads(line) for line in (folder / "valid.jsonl").read_text().splitlines()]


def test_curves_start_at_the_base_and_have_every_nth_step_and_every_end_of_an_epoch_once(data, tmp_path):
    train.main(flags(data, tmp_path / "often", eval_every=3))
    train.main(flags(data, tmp_path / "seldom"))
    often, seldom = held_out(tmp_path / "often"), held_out(tmp_path / "seldom")
    assert [record["step"] for record in often] == [0, 3, 4, 6, 8]
    assert [record["step"] for record in seldom] == [4, 8]
    assert [record for record in often if record["step"] in (4, 8)] == seldom
    # The model is its own reference: no margin but rounding, and a loss of log 2.
    assert often[0]["loss_dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert (tmp_path / "often" / "rwkv-final.pth").read_bytes() == (tmp_path / "seldom" / "rwkv-final.pth").read_bytes()


@pytest.mark.parametrize("step", [3, 4, 5])
def test_a_resumed_run_has_the_same_curve(data, tmp_path, step):
    train.main(flags(data, tmp_path / "whole", eval_every=2))
    run_to(step, flags(data, tmp_path / "parts", eval_every=2))
    train.main(flags(data, tmp_path / "parts", eval_every=2))
    assert held_out(tmp_path / "parts") == held_out(tmp_path / "whole")


@pytest.mark.parametrize(("peft", "best", "final"), [
    ("none", "rwkv-best.pth", "rwkv-final.pth"), ("state", "state-best.pth", "state-final.pth"),
    ("lora", "adapter-best/adapter_model.safetensors", "adapter-final/adapter_model.safetensors"),
])  # fmt: skip
def test_the_best_weights_are_kept_and_a_resumed_run_keeps_the_same(data, tmp_path, monkeypatch, peft, best, final):
    """Of seven evaluations the fourth is the best, whatever the model says."""
    figures = {0: 0.7, 1: 0.69, 2: 0.75, 3: 0.5, 4: 0.6, 5: 0.5, 6: 0.9}

    def evaluated(model, pairs, mixture, batch_tokens, progress):
        return {"loss_dpo": figures.get(steps[0], 1.0), "rewards/accuracies": 0.5, "rewards/margins": 0.0}

    def at_step(self, trainer, module):
        steps[0] = trainer.global_step
        evaluate(self, trainer, module)

    steps, evaluate = [0], validation.HeldOut._evaluate
    monkeypatch.setattr(validation, "evaluate_pairs", evaluated)
    monkeypatch.setattr(validation.HeldOut, "_evaluate", at_step)
    own = {"peft": peft, "eval_every": 1, "keep_best": "loss_dpo", "lr_init": 0.1, "lr_final": 0.1}
    train.main(flags(data, tmp_path / "three", **own, epoch_steps=3, epoch_count=1))
    train.main(flags(data, tmp_path / "whole", **own))
    # The learning rate is the same throughout, so that three steps are the first three of eight.
    assert read_all(tmp_path / "whole" / best) == read_all(tmp_path / "three" / final)
    run_to(5, flags(data, tmp_path / "parts", **own))
    train.main(flags(data, tmp_path / "parts", **own))
    assert read_all(tmp_path / "parts" / best) == read_all(tmp_path / "whole" / best)


def test_some_pairs_are_drawn_by_the_seed(data, tmp_path):
    train.main(flags(data, tmp_path / "out", eval_pairs=4, epoch_count=1))
    assert held_out(tmp_path / "out")[0]["pairs"] == 4
    pairs = runs.load_pairs(data / "valid.save")
    one, same, other = (drawn(pairs, 4, seed) for seed in (0, 0, 3))
    assert one.tokens.tolist() == same.tokens.tolist() != other.tokens.tolist()
    assert drawn(pairs, 0, 0) is drawn(pairs, len(pairs), 0) is pairs


@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 8), (50, 100), (499, 500), (12, 12)])
def test_the_interval_is_wilsons(k, n):
    wanted = binomtest(k, n).proportion_ci(0.95, "wilson")
    assert interval(k / n, n) == pytest.approx([wanted.low, wanted.high], abs=1e-6)
    assert all(math.copysign(1, bound) == 1 and bound <= 1 for bound in interval(k / n, n))
