"""Checkpoints that other programs wrote, in the forms that people have them."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.files.torch_files import load_torch
from rwkv_dpo.model.checkpoint import load_into, load_model, read_checkpoint, read_weights, save_weights, shape_of
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.tuning.states import add_states
from rwkv_package import TOLERANCE, one_sequence, package_model

HERE = Path(__file__).parent
SHAPE = ModelShape(2, 64, 64, 224, 71, head_size=32)


@pytest.fixture(scope="module")
def written(lives, tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    done = lives.script(HERE / "foreign_writers.py", [folder], folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def load(path):
    return load_model(path, device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="reference")


@pytest.mark.parametrize("name", [
    "compiled.pth", "compiled_blocks.pth", "script.pth", "script_old.pth", "lightning.ckpt", "lightning_compiled.ckpt", "ddp.pth",
    "deepspeed/global_step0/mp_rank_00_model_states.pt",
])  # fmt: skip
def test_the_model_in_a_trainers_checkpoint_is_found(written, name):
    expected, found = load(written / "model.pth").state_dict(), load(written / name).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_what_a_lightning_module_has_beside_the_model_is_told_of(written, caplog):
    with caplog.at_level("INFO"):
        weights = read_weights(written / "lightning.ckpt")
    assert weights.keys() == read_weights(written / "model.pth").keys()
    assert "lightning.ckpt: 3 tensors beside the model's weights are left out (n_seen ...)" in caplog.text


def test_settings_of_classes_that_are_not_here_come_as_empty_stand_ins(written):
    parameters = load_torch(written / "lightning.ckpt")["hyper_parameters"]
    assert [type(value).__name__ for value in parameters.values()] == ["Namespace", "Settings"]
    assert not hasattr(parameters["arguments"], "lr")


@pytest.mark.parametrize("name", ["tied.pth", "tied.safetensors"])
def test_a_tied_head_becomes_two_matrices(written, name, caplog):
    with caplog.at_level("INFO"):
        model = load(written / name)
    assert torch.equal(model.head.weight, model.emb.weight)
    assert torch.equal(model.emb.weight, load(written / "model.pth").emb.weight)
    assert model.head.weight.data_ptr() != model.emb.weight.data_ptr()
    assert ("has no head.weight; emb.weight is taken for both" in caplog.text) == name.endswith("safetensors")


def test_a_partial_load_ties_nothing(written):
    weights = read_checkpoint(written / "tied.safetensors", partial=True)
    model = random_model(shape_of(weights, "tied"), torch.float32, seed=5)
    head = model.head.weight.clone()
    load_into(model, weights, "tied", partial=True)
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize(("name", "message"), [
    ("whole_module.pth", r"whole_module.pth: .*(holds RWKV|it names)"),
    ("hf/model.safetensors", r"model.safetensors: an RWKV-4 checkpoint; RWKV-5.2 .*, 6 .* and 7 .* are supported"),
    ("hf", r"hf: a folder; a checkpoint is a file in it, such as model.safetensors"),
    ("deepspeed", r"deepspeed: a folder; DeepSpeed's zero_to_fp32.py in it"),
])  # fmt: skip
def test_what_holds_no_such_model_is_named(written, name, message):
    with pytest.raises(InputError, match=message):
        load(written / name)


def test_squeezed_token_mixes_are_read(tmp_path):
    model = random_model(SHAPE, torch.float32)
    for name, change in {"c.pth": torch.Tensor.squeeze, "1c.pth": lambda x: x.squeeze(0)}.items():
        torch.save({n: change(w) if ".time_mix_" in n else w for n, w in model.state_dict().items()}, tmp_path / name)
        for a, b in zip(model.parameters(), load(tmp_path / name).parameters(), strict=True):
            assert torch.equal(a, b)


def merged_with_states(folder):
    """A model and states that moved, joined as ChatRWKV's rwkv_state_merger.py joins them: one dictionary saved by torch."""
    model = random_model(SHAPE, torch.float32)
    save_weights(model.state_dict(), folder / "base.pth")
    add_states(model)
    states = {name: torch.randn(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    base = torch.load(folder / "base.pth")
    for name in states:
        base[name] = states[name].clone()
    torch.save(base, folder / "merged.pth")
    return states


@torch.no_grad()
def test_states_in_a_checkpoint_are_the_models_as_the_rwkv_package_has_them(tmp_path):
    states = merged_with_states(tmp_path)
    model = load(tmp_path / "merged.pth")
    tokens = np.random.default_rng(1).integers(0, SHAPE.vocab_size, 20).tolist()
    (tmp_path / "package").mkdir()
    expected, _ = package_model(model, tmp_path / "package").forward(tokens, None, full_output=True)
    torch.testing.assert_close(model.head(model(one_sequence(tokens))[0]), expected, rtol=0, atol=TOLERANCE)
    plain = load(tmp_path / "base.pth")
    assert (plain.head(plain(one_sequence(tokens))[0]) - expected).abs().max() > 100 * TOLERANCE
    assert {name: p.tolist() for name, p in model.named_parameters() if name in states} == {n: p.tolist() for n, p in states.items()}


def test_states_of_some_layers_are_refused(tmp_path):
    merged_with_states(tmp_path)
    weights = torch.load(tmp_path / "merged.pth")
    del weights["blocks.1.att.time_state"]
    torch.save(weights, tmp_path / "half.pth")
    with pytest.raises(InputError, match=r"half.pth: missing blocks.1.att.time_state"):
        load(tmp_path / "half.pth")


def test_a_model_that_the_rwkv_package_converted_is_refused(tmp_path):
    save_weights(random_model(SHAPE, torch.float32).state_dict(), tmp_path / "m.pth")
    os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "0"}
    from rwkv.model import RWKV

    with pytest.raises(SystemExit):
        RWKV(str(tmp_path / "m"), "cpu fp32", verbose=False, convert_and_save_and_exit=str(tmp_path / "converted"))
    with pytest.raises(InputError, match=r"converted.pth: converted for inference by the rwkv package"):
        load(tmp_path / "converted.pth")


@pytest.mark.parametrize(("edit", "message"), [
    # RWKV-5.1: one decay and one bonus a head; 5.0: no gate either. The rwkv package tells them so.
    (lambda w: {n: x.mean(1) if n.endswith(("time_decay", "time_faaaa")) else x for n, x in w.items()}, "an RWKV-5.1 checkpoint"),
    (lambda w: {n: x.mean(1)[:, None, None] if n.endswith("time_decay") else x for n, x in w.items()}, "an RWKV-5.1 checkpoint"),
    (lambda w: {n: x for n, x in w.items() if ".gate." not in n and "_mix_g" not in n}, "an RWKV-5.0 checkpoint"),
    (lambda w: {"blocks.0.att.time_state": torch.zeros(2, 32, 32)}, "tuned states, which --peft state --peft_load takes"),
    (lambda w: {"blocks.0.att.key.lora_A": torch.zeros(4, 64)}, "holds a LoRA's matrices"),
    (lambda w: {"state_dict": {"generator.weight": torch.ones(3)}}, "entry 'state_dict' holds dict"),
    (lambda w: {"state_dict": {**w, "module.emb.weight": w["emb.weight"]}}, "holds emb.weight twice, once as module.emb.weight"),
    (lambda w: {"state_dict": {**w, "head.weight": w["head.weight"].to(torch.int8)}}, "entry 'head.weight' holds torch.int8"),
])  # fmt: skip
def test_other_files_are_refused_by_what_they_are(tmp_path, edit, message):
    torch.save(edit(dict(random_model(SHAPE, torch.float32).state_dict())), tmp_path / "m.pth")
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path / "m.pth")
    assert "m.pth: " in str(error.value)


# As https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md has them.
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12345\n"


@pytest.mark.parametrize(("content", "message"), [
    (POINTER, "m.pth: not a checkpoint but a Git LFS pointer, which stands for the file; git lfs pull"),
    (b"<!doctype html><html><head><title>Not found</title>", "m.pth: not a checkpoint but a web page"),
    (b"", "m.pth: not a checkpoint but an empty file"),
    (bytes(70000), "m.pth: not a checkpoint but a file of zeros"),
    (b"GGUF\3\0\0\0" + bytes(99), "m.pth: not a checkpoint but a GGUF file"),
    (b"PK\3\4", "m.pth: not a"),
], ids=["pointer", "page", "empty", "zeros", "gguf", "torn"])  # fmt: skip
def test_what_a_download_left_is_named(tmp_path, content, message):
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "m.pth")


def test_a_pair_file_is_no_checkpoint(tmp_path):
    torch.save([([1], [2], [3], -1.0, -2.0)], tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"m.pth: not a checkpoint but a list that torch.save wrote, .*--dpo_train_file"):
        load(tmp_path / "m.pth")


class Settings:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(("call", "message"), [
    ((os.system, "touch ran"), "it names posix.system"), ((eval, "open('ran', 'w')"), "it names __builtin__.eval"),
    ((subprocess.Popen, ["touch", "ran"]), ""),
], ids=str)  # fmt: skip
def test_settings_that_call_are_refused_or_forgotten_and_never_called(tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    model = random_model(SHAPE, torch.float32)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": {"x": Settings(*call)}}, "m.pth")
    if message:
        with pytest.raises(InputError, match=message):
            load("m.pth")
    else:
        assert torch.equal(load("m.pth").head.weight, model.head.weight)
    assert not Path("ran").exists()


def test_a_file_of_many_foreign_names_is_refused(tmp_path):
    file = io.BytesIO()
    classes = [type(f"C{i}", (), {"__module__": "m"}) for i in range(300)]
    module = type(sys)("m")
    for one in classes:
        setattr(module, one.__name__, one)
    sys.modules["m"] = module
    try:
        torch.save({"state_dict": {}, "classes": classes}, file)
    finally:
        del sys.modules["m"]
    (tmp_path / "m.pth").write_bytes(file.getvalue())
    with pytest.raises(InputError, match=r"m.pth: .*it names m.C"):
        load(tmp_path / "m.pth")
