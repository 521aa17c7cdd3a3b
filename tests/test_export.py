"""export.py: what it writes against the `rwkv` package and the model it came from, and what it refuses."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.commands import export
from rwkv_dpo.files.hashed import fault_of
from rwkv_dpo.model.checkpoint import load_model, read_weights, save_weights
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.tuning.adapter_files import METHODS
from rwkv_dpo.tuning.adapters import add_adapter, plan_adapter
from rwkv_dpo.tuning.export import rounding_bound
from rwkv_dpo.tuning.states import add_states
from rwkv_dpo.tuning.tuning import load_tuned

sys.path.insert(0, str(Path(__file__).parent / "model"))
from rwkv_package import TOLERANCE, package_model

SHAPE = ModelShape(2, 64, 64, 224, 71, head_size=32)
TOKENS = np.random.default_rng(1).integers(0, 71, 25).tolist()


@pytest.fixture
def base(tmp_path):
    save_weights(random_model(SHAPE, torch.float32).state_dict(), tmp_path / "base.pth")
    return tmp_path / "base.pth"


def tuned(folder, method, scale=0.1):
    """Saves an adapter or states that have moved; returns their path."""
    model = random_model(SHAPE, torch.float32)
    if method == "state":
        tuning, name = add_states(model), "state-x.pth"
    else:
        extra = "ln" if method == "lora" else ""
        plan = plan_adapter(model, method, 4, 8, 0.0, "receptance,key,value,gate,output", "", extra)
        tuning, name = add_adapter(model, plan), "adapter-x"
    torch.manual_seed(3)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(scale * torch.randn_like(p))
    tuning.save(trained, folder, "x")
    return folder / name


def run(*arguments):
    export.main([str(a) for a in arguments])


@torch.no_grad()
def logits(base, tuned_path=None):
    model = load_model(base, device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="reference")
    if tuned_path is not None:
        load_tuned(model, tuned_path)
    builder = ForestBuilder()
    builder.add(TOKENS)
    return model.head(model(builder.build()[0])[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_file_is_the_tuned_model_in_the_rwkv_package_too(base, tmp_path, method):
    path = tuned(tmp_path, method)
    run("--load_model", base, "--peft_load", path, "--out", tmp_path / "merged.pth")
    want = logits(base, path)
    assert (want - logits(base)).abs().max() > 0.1
    torch.testing.assert_close(logits(tmp_path / "merged.pth"), want, rtol=0, atol=TOLERANCE)
    weights = read_weights(tmp_path / "merged.pth")
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in read_weights(base).items()}
    assert {w.dtype for w in weights.values()} == {torch.float32}
    merged = random_model(SHAPE, torch.float32)
    merged.load_state_dict(weights)
    package = package_model(merged, tmp_path)
    torch.testing.assert_close(package.forward(TOKENS, None, full_output=True)[0], want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_smaller_type_halves_the_file_and_rounds_each_weight_once(base, tmp_path, dtype):
    path = tuned(tmp_path, "lora")
    run("--load_model", base, "--peft_load", path, "--out", tmp_path / "full.pth")
    run("--load_model", base, "--peft_load", path, "--out", tmp_path / "half.pth", "--dtype", dtype)
    full, half = read_weights(tmp_path / "full.pth"), read_weights(tmp_path / "half.pth")
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert all(torch.equal(half[name], full[name].to(kind)) for name in full)
    before, after = logits(tmp_path / "full.pth"), logits(tmp_path / "half.pth")
    difference = (after - before).square().mean().sqrt() / before.square().mean().sqrt()
    # The bound that export.py derives holds with room, and is not a hundred times too wide.
    assert rounding_bound(kind, SHAPE.n_layer) / 100 < difference < rounding_bound(kind, SHAPE.n_layer) / 1.5


def test_safetensors_and_back_is_the_same_file_of_weights(base, tmp_path):
    run("--load_model", base, "--out", tmp_path / "m.safetensors")
    run("--load_model", tmp_path / "m.safetensors", "--out", tmp_path / "again.pth")
    want, got, form = read_weights(base), read_weights(tmp_path / "again.pth"), read_weights(tmp_path / "m.safetensors")
    assert got.keys() == want.keys() == form.keys()
    assert all(torch.equal(got[n], want[n]) and torch.equal(form[n], want[n]) for n in want)
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "m.safetensors")["head.weight"], want["head.weight"])


def test_a_state_file_passes_through_unmerged(base, tmp_path):
    path = tuned(tmp_path, "state", scale=1.0)
    run("--load_model", base, "--peft_load", path, "--out", tmp_path / "s.safetensors", "--dtype", "bf16")
    got = read_weights(tmp_path / "s.safetensors")
    assert all(torch.equal(got[n], w.bfloat16()) for n, w in read_weights(path).items())
    difference = logits(base, tmp_path / "s.safetensors") - logits(base, path)
    assert 0 < difference.abs().max() < 0.1


def test_what_rounding_does_not_explain_is_refused_and_not_written(base, tmp_path):
    weights = read_weights(base)
    # 1e6 has no fp16; the layer norm behind it makes the model as good as any in fp32.
    save_weights({**weights, "emb.weight": weights["emb.weight"] * 1e6}, tmp_path / "large.pth")
    run("--load_model", tmp_path / "large.pth", "--out", tmp_path / "ok.pth", "--dtype", "bf16")
    with pytest.raises(InputError, match=r"half.pth: not written: its logits would differ by (nan|inf|\d).* rounding explains 0.0"):
        run("--load_model", tmp_path / "large.pth", "--out", tmp_path / "half.pth", "--dtype", "fp16")
    files = {"base.pth", "large.pth", "ok.pth"}
    assert {p.name for p in tmp_path.iterdir()} == files | {f"{name}.sha256" for name in files}
    assert fault_of(tmp_path / "ok.pth") == ""


def test_an_existing_file_is_kept_unless_overwritten(base, tmp_path):
    out = tmp_path / "out.pth"
    out.write_text("precious")
    with pytest.raises(InputError, match=r"--out .*out.pth: exists; --overwrite 1 replaces it"):
        run("--load_model", base, "--out", out)
    assert out.read_text() == "precious"
    run("--load_model", base, "--out", out, "--overwrite", 1)
    assert read_weights(out).keys() == read_weights(base).keys()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--load_model", "none.pth", "--out", "o.pth"], r"none.pth: no such checkpoint"),
    (["--load_model", "base.pth", "--out", "o.bin"], r"--out o.bin: names that end in .pth or .safetensors"),
    (["--load_model", "base.pth", "--out", "o.pth", "--peft_load", "none"], "none: no such checkpoint"),
    (["--load_model", "base.pth", "--out", "o.pth", "--peft_load", "."], "adapter_config.json: no such file"),
    (["--load_model", "base.pth", "--out", "o.pth", "--peft_load", "base.pth"], "base.pth: not a state file"),
    (["--load_model", "base.pth", "--out", "o.pth", "--dtype", "int8"], "--dtype"),
    (["--load_model", "base.pth", "--out", "nowhere/o.pth"], "cannot be written"),
    (["--load_model", "torn.safetensors", "--out", "o.pth"], r"torn.safetensors: not a readable safetensors file"),
    (["--load_model", "ints.safetensors", "--out", "o.pth"], r"ints.safetensors: entry 'x' holds torch.int64"),
])  # fmt: skip
def test_faults_are_named(base, monkeypatch, arguments, message):
    from safetensors.torch import save_file

    monkeypatch.chdir(base.parent)
    Path("torn.safetensors").write_bytes(b"\0\1\0\0\0\0\0\0{torn")
    save_file({"x": torch.zeros(2, dtype=torch.int64)}, "ints.safetensors")
    with pytest.raises(InputError, match=message) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    assert not Path("o.pth").exists()
