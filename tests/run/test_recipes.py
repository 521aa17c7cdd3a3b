"""--recipe and --epochs: what follows from what was given."""

import json
import logging
from types import SimpleNamespace

import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.run import recipes
from rwkv_dpo.run.data import open_data, tell_corpus
from rwkv_dpo.run.flags import parse_flags
from rwkv_dpo.run.recipes import with_length, with_recipe


def settings_of(data, text):
    settings, given = parse_flags(text.replace("DATA/", f"{data}/").split())
    settings = tell_corpus(with_recipe(settings, given), given)
    return with_length(settings, given, open_data(settings, 61))


PAIRS = "--load_model DATA/model.pth --dpo_train_file DATA/train.save --accelerator cpu --proj_dir DATA/none"
CORPUS = "--data_file DATA/corpus.bin --data_type uint16 --ctx_len 12"


def test_epochs_are_passes_over_the_pairs(data):
    s = settings_of(data, f"{PAIRS} --epochs 3 --micro_bsz 4")
    assert (s.epochs.epoch_count, s.epochs.epoch_steps, s.length.total_steps) == (3, 3, 9)  # 10 pairs
    s = settings_of(data, f"{PAIRS} --epochs 3 --micro_bsz 1 --accumulate_grad_batches 4")
    assert (s.epochs.epoch_steps, s.length.total_steps) == (12, 9)
    s = settings_of(data, f"{PAIRS} {CORPUS} --dpo 0 --vocab_size 61 --epochs 1 --micro_bsz 10")
    assert s.epochs.epoch_steps == 34  # 333 windows


def test_what_is_given_comes_first(data, caplog):
    caplog.set_level(logging.INFO)
    s = settings_of(data, f"{PAIRS} --recipe dpo --lr_init 1e-3 --dpo_beta 0.5 --micro_bsz 5 --dpo_valid_file DATA/valid.save")
    assert (s.optimizer.lr_init, s.optimizer.lr_final, s.objective.dpo_beta, s.batches.micro_bsz) == (1e-3, 2e-4, 0.5, 5)
    assert (s.devices.precision, s.held_out.keep_best, s.held_out.eval_every) == ("fp32", "loss_dpo", 1)
    assert s.objective.dpo_general_corpus_ratio == 0
    told = " ".join(record.getMessage() for record in caplog.records if "--recipe dpo" in record.getMessage())
    assert "--precision fp32" in told
    assert "--keep_best loss_dpo" in told
    assert "--lr_init" not in told
    assert "--dpo_beta" not in told
    assert settings_of(data, f"{PAIRS} {CORPUS} --recipe dpo").objective.dpo_general_corpus_ratio == 0.8


def test_wider_models_learn_at_lower_rates_but_states_do_not(data, monkeypatch):
    swept = {name: recipe["lr_init"] for name, recipe in recipes._RECIPES.items()}

    def rates(width):
        monkeypatch.setattr(recipes, "expected_shape", lambda settings, given: SimpleNamespace(n_embd=width))
        return {name: settings_of(data, f"{PAIRS} {CORPUS} --vocab_size 61 --recipe {name}").optimizer.lr_init for name in swept}

    assert rates(128) == rates(32) == swept
    alone = settings_of(data, f"{PAIRS} --recipe dpo").optimizer.lr_init
    assert alone == pytest.approx(0.2 * swept["dpo"])
    wide = rates(1024)
    assert {name: round(swept[name] / wide[name]) for name in swept} == {"dpo": 64, "lora": 64, "state": 1, "pretrain": 8}
    assert wide["dpo"] == pytest.approx(5e-6, rel=0.25)  # the original's at this width


def test_a_dry_run_is_of_the_accelerator_that_is_named(data):
    s = settings_of(data, f"{PAIRS} --recipe lora --dry_run 1".replace("--accelerator cpu", "--accelerator gpu"))
    assert (s.devices.accelerator, s.devices.precision) == ("gpu", "bf16")


@pytest.mark.parametrize(("more", "words"), [
    ("--epochs 2 --epoch_steps 5", "--epochs 2: --epoch_steps sets the same"),
    ("--epochs 2 --epoch_count 5", "--epochs 2: --epoch_count sets the same"),
    ("--recipe dpo --epochs -1", "--epochs -1: 0 or more is accepted"),
    ("--recipe best", "--recipe 'best': accepted are '', 'dpo', 'lora', 'state', 'pretrain'"),
])  # fmt: skip
def test_what_is_said_twice_or_is_no_recipe(data, more, words):
    with pytest.raises(InputError, match=words):
        settings_of(data, f"{PAIRS} {more}")


def test_flags_of_what_the_recipe_sets_are_taken(data):
    s = settings_of(data, f"{PAIRS} --recipe lora --lora_r 4 --quant nf4")
    assert (s.tuning.peft, s.tuning.lora_r, s.tuning.quant) == ("lora", 4, "nf4")
    with pytest.raises(InputError, match="--lora_r 4: --peft state trains no adapter"):
        settings_of(data, f"{PAIRS} --recipe state --lora_r 4")


@pytest.mark.parametrize(("recipe", "wrote"), [
    ("dpo", "rwkv-final.pth"), ("lora", "adapter-final"), ("state", "state-final.pth"), ("pretrain", "rwkv-final.pth"),
])  # fmt: skip
def test_a_recipe_runs_and_the_same_command_knows_that_it_has(data, tmp_path, recipe, wrote, caplog):
    caplog.set_level(logging.INFO)
    given = {"accelerator": "cpu", "wkv_backend": "cpu", "enable_progress_bar": False, "proj_dir": tmp_path, "cpu_malloc": 0}
    if recipe == "pretrain":
        given |= {"data_file": data / "corpus.bin", "data_type": "uint16", "ctx_len": 100, "vocab_size": 61, "n_layer": 1, "n_embd": 64}
    else:
        given |= {"load_model": data / "model.pth", "dpo_train_file": data / "train.save", "dpo_valid_file": data / "valid.save"}
    flags = ["--recipe", recipe, *(part for name, value in given.items() for part in (f"--{name}", str(value)))]
    train.main(flags)
    assert (tmp_path / wrote).exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["epoch_count"] == config["epochs"] > 0
    train.main(flags)
    assert "holds the end of this run" in caplog.text
