"""Reading and writing .pth files, and every way a file can be wrong."""

import pickle
from dataclasses import replace

import pytest
import torch
from conftest import random_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.model.checkpoint import load_into, load_model, read_weights, save_weights, shape_of, version_of
from rwkv_dpo.model.shape import ModelShape, check_flags


@pytest.fixture
def saved(tiny_shape, tmp_path):
    model = random_model(tiny_shape, torch.float32)
    save_weights(model.state_dict(), tmp_path / "m.pth")
    return model, tmp_path / "m.pth"


def test_a_saved_model_comes_back_with_its_shape_and_weights(saved, tiny_shape):
    model, path = saved
    weights = read_weights(path)
    assert version_of(weights, path) == "5"
    assert shape_of(weights, path) == tiny_shape
    loaded = load_model(path, device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="reference")
    for a, b in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("version", "ranks"), [("6", (80, 24)), ("7", (16, 24, 40, 48))])
@pytest.mark.parametrize("squeezed", [False, True])
def test_version_and_ranks_are_read_off_the_weights(version, ranks, squeezed, tiny_shape, tmp_path):
    """Vectors may have lost their two dimensions of 1."""
    model = random_model(replace(tiny_shape, ranks=ranks), torch.float32, version=version)
    weights = model.state_dict()
    if squeezed:
        weights |= {name: w.flatten() for name, w in weights.items() if w.shape[:2] == (1, 1) and "decay" not in name}
    save_weights(weights, tmp_path / "m.pth")
    found = read_weights(tmp_path / "m.pth")
    assert version_of(found, "m") == version
    assert shape_of(found, "m") == model.shape == replace(tiny_shape, ranks=ranks, version=version)
    loaded = load(tmp_path / "m.pth")
    assert loaded.shape.version == version
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("n_layer", [1, 2])
def test_the_first_layers_v0_v1_and_v2_may_be_there(n_layer, tiny_shape, tmp_path):
    model = random_model(replace(tiny_shape, n_layer=n_layer), torch.float32, version="7")
    unread = {"blocks.0.att.v0": torch.ones(1, 1, 32), "blocks.0.att.v1": torch.ones(32, 32), "blocks.0.att.v2": torch.ones(32, 32)}
    save_weights({**model.state_dict(), **unread}, tmp_path / "m.pth")
    assert load(tmp_path / "m.pth").state_dict().keys() == model.state_dict().keys()


def test_bf16_files_and_deepspeed_prefixes_are_read(saved, tmp_path):
    model, _ = saved
    torch.save({f"_forward_module.{n}": p.bfloat16() for n, p in model.state_dict().items()}, tmp_path / "b.pth")
    loaded = load_model(tmp_path / "b.pth", device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="reference")
    assert torch.equal(loaded.head.weight, model.head.weight.bfloat16().float())
    assert loaded.head.weight.dtype == torch.float32


def test_the_old_file_format_of_torch_is_read(saved, tmp_path):
    model, _ = saved
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(tmp_path / "old.pth")["head.weight"], model.head.weight)


def edited(saved, edit):
    model, path = saved
    weights = dict(model.state_dict())
    edit(weights)
    torch.save(weights, path)
    return path


def load(path):
    return load_model(path, device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="reference")


@pytest.mark.parametrize(("edit", "message"), [
    (lambda w: w.pop("blocks.1.ln1.bias"), "missing blocks.1.ln1.bias"),
    (lambda w: w.update(extra=torch.ones(2)), "unexpected extra"),
    (lambda w: w.update({"blocks.1.ffn.key.weight": torch.ones(3, 3)}), r"blocks.1.ffn.key.weight \(3, 3\) instead of \(96, 32\)"),
    (lambda w: w.pop("emb.weight"), "emb.weight is missing"),
    (lambda w: w.update({"blocks.0.qkv.qq.weight": torch.ones(2)}), "RWKV-7b checkpoint; RWKV-5.2 .* are supported"),
    (lambda w: w.update({"blocks.0.ffn.s_emb.weight": torch.ones(2)}), "RWKV-7a checkpoint"),
    (lambda w: w.update({"blocks.0.att.x_r": torch.ones(2)}), "blocks.0.att.r_k is missing"),
    (lambda w: w.update({"blocks.0.att.time_maa_x": torch.ones(1, 1, 32)}), "missing blocks.0.att.time_decay_w1.*unexpected"),
    (lambda w: w.pop("blocks.0.att.gate.weight"), "RWKV-5.0 checkpoint"),
    (lambda w: w.update({"blocks.0.att.time_decay": torch.ones(4)}), "RWKV-5.1 checkpoint"),
    (lambda w: w.update({"emb.weight": torch.ones(4)}), r"emb.weight has shape \(4,\)"),
    (lambda w: w.clear(), "holds dict"),
    (lambda w: w.update({"emb.weight": 3}), "'emb.weight' holds int"),
])  # fmt: skip
def test_a_wrong_file_is_refused_by_what_is_wrong_with_it(saved, edit, message):
    path = edited(saved, edit)
    with pytest.raises(InputError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


class Bomb:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_file_that_carries_code_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"emb.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(InputError, match=r"bomb\.pth"):
        load(tmp_path / "bomb.pth")
    (tmp_path / "bomb2.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match=r"bomb2\.pth"):
        load(tmp_path / "bomb2.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_a_torn_file_is_refused(saved, keep):
    _, path = saved
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"m\.pth"):
        load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.pth: no such checkpoint"):
        load(tmp_path / "none.pth")


def test_a_name_that_is_nearly_a_file_is_answered(saved, tmp_path):
    with pytest.raises(InputError, match=r"m: no such checkpoint; .*m\.pth is one"):
        load(tmp_path / "m")
    with pytest.raises(InputError, match=r"RWKV/v5-Eagle-7B-HF: no such checkpoint; from the Hub it has to be downloaded first"):
        load("RWKV/v5-Eagle-7B-HF")


def test_flags_that_contradict_the_file_are_refused_by_name(tiny_shape):
    check_flags(tiny_shape, {"n_layer": 2}, "m.pth")
    with pytest.raises(InputError, match=r"--n_embd 64 \(the file has 32\), --head_size_a 64 \(the file has 8\)"):
        check_flags(tiny_shape, {"n_layer": 2, "n_embd": 64, "head_size": 64}, "m.pth")


def test_partial_loading_keeps_what_the_file_lacks(tiny_shape):
    model = random_model(tiny_shape, torch.float32)
    kept = model.head.weight.clone()
    load_into(model, {"emb.weight": torch.zeros(61, 32)}, "m.pth", partial=True)
    assert torch.equal(model.head.weight, kept)
    assert not model.emb.weight.any()


def test_saving_over_a_file_leaves_no_half_file_behind(saved, tmp_path):
    model, path = saved
    save_weights(model.state_dict(), path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.pth", "m.pth.sha256"]


def test_a_dim_att_that_heads_do_not_divide_is_refused():
    with pytest.raises(InputError, match="--dim_att 48 is not a multiple of --head_size_a 32"):
        random_model(ModelShape(1, 48, 48, 96, 10, head_size=32))
