"""Adapters and tuned states know their base model: on another one they are refused, whatever its shape."""

import hashlib
import shutil

import pytest
import runs
import torch
from conftest import random_model
from runs import TINY, write_inputs
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import evaluate, export, train
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.tuning.base import base_of

METHODS = {"lora": "adapter-final", "pissa": "adapter-final", "state": "state-final.pth"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_inputs(folder, TINY, 6)
    save_weights(random_model(TINY, torch.float32, seed=1).state_dict(), folder / "other.pth")
    return folder


def flags(data, proj_dir, method, **changes):
    tuned = {"peft": method, "lora_r": None if method == "state" else 2}
    return runs.flags(data, proj_dir, **{"epoch_steps": 1, "epoch_count": 1, "micro_bsz": 1, **tuned, **changes})


@pytest.fixture(scope="module", params=METHODS)
def tuned(data, request, tmp_path_factory):
    """A method, and what a run of it saved last."""
    folder = tmp_path_factory.mktemp(request.param)
    train.main(flags(data, folder, request.param))
    return request.param, folder / METHODS[request.param]


REFUSED = r"was trained on another base model \(sha256 \w{12}\.\.\.\) than \S+other\.pth; --any_base 1 accepts it anyway"


def test_it_carries_the_sha256_of_its_base(data, tuned):
    assert base_of(tuned[1]) == hashlib.sha256((data / "model.pth").read_bytes()).hexdigest()


def test_another_base_is_refused_everywhere_unless_any_will_do(data, tuned, tmp_path):
    method, path = tuned
    other = {"load_model": data / "other.pth", "peft_load": path, "dpo_ref": "recompute", "lora_r": None}
    both = ["--load_model", str(data / "other.pth"), "--peft_load", str(path)]
    ways = {
        "train": lambda *more: train.main(flags(data, tmp_path / "out", method, **other) + list(more)),
        "export": lambda *more: export.main([*both, "--out", str(tmp_path / "merged.pth"), *more]),
        "evaluate": lambda *more: evaluate.main([*both, "--pairs", str(data / "train.save"), "--device", "cpu", *more]),
    }
    for run in ways.values():
        with pytest.raises(InputError, match=REFUSED):
            run()
        run("--any_base", "1")
    with pytest.raises(InputError, match=rf"^{path}"):
        ways["train"]("--proj_dir", str(tmp_path / "another"))


def test_the_same_base_under_another_name_is_the_same(data, tuned, tmp_path):
    method, path = tuned
    shutil.copy(data / "model.pth", tmp_path / "moved.pth")
    train.main(flags(data, tmp_path / "out", method, load_model=tmp_path / "moved.pth", peft_load=path, lora_r=None))


def test_states_of_any_form_keep_it_and_load_elsewhere(data, tmp_path):
    train.main(flags(data, tmp_path, "state"))
    base = base_of(tmp_path / "state-final.pth")
    plain = torch.load(tmp_path / "state-final.pth", weights_only=True)
    assert plain.keys() == {f"blocks.{layer}.att.time_state" for layer in range(TINY.n_layer)}
    both = ["--load_model", str(data / "model.pth"), "--peft_load", str(tmp_path / "state-final.pth")]
    for name in ("converted.safetensors", "converted.pth"):
        export.main([*both, "--out", str(tmp_path / name)])
        assert base_of(tmp_path / name) == base


def test_what_other_programs_wrote_says_nothing_of_its_base_and_is_taken(data, tmp_path):
    states = {f"blocks.{layer}.att.time_state": torch.zeros(TINY.n_head, 8, 8) for layer in range(TINY.n_layer)}
    for old in (True, False):
        torch.save(states, tmp_path / "s.pth", _use_new_zipfile_serialization=not old)
        assert base_of(tmp_path / "s.pth") == ""
        arguments = ["--load_model", str(data / "other.pth"), "--peft_load", str(tmp_path / "s.pth"), "--pairs", str(data / "train.save")]
        evaluate.main([*arguments, "--device", "cpu"])
