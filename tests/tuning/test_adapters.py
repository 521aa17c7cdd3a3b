"""Adapters: their start, values and gradients against materialised weights and peft's own layers, and their files through peft."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import random_model
from materialised import Materialised
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.batches.micro_batch import collate
from rwkv_dpo.model.linear import Linear
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.objective.objective import objective
from rwkv_dpo.tuning.adapter_files import METHODS, read_adapter
from rwkv_dpo.tuning.adapters import add_adapter, merged_weights, parse_layers, plan_adapter
from rwkv_dpo.tuning.settings import TuningSettings
from rwkv_dpo.tuning.tuning import begin_tuning, load_tuned
from torch import nn

ALL = "receptance,key,value,gate,output"
R, ALPHA = 4, 6


def planned(model, method, targets=ALL, layers="", extra="", dropout=0.0):
    return plan_adapter(model, method, R, ALPHA, dropout, targets, layers, extra)


def adapted(shape, method, dtype=torch.float32, moved=True, grad_cp="0", **plan):
    """A model with an adapter whose weights have moved, and the adapter. peft starts PiSSA in fp32 only, so that float64 follows."""
    model = random_model(shape, torch.float32, grad_cp=grad_cp)
    adapter = add_adapter(model, planned(model, method, **plan))
    model.to(dtype).compute_dtype = dtype
    if moved:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in trained(model).values():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model, adapter


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def batch(shape):
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.integers(0, shape.vocab_size, n) for n in (5, 4, 7)) for _ in range(2)]
    return collate([rng.integers(0, shape.vocab_size, 9)], pairs, np.full((2, 2), -20.0))


def logits(model, step):
    hidden, _ = model(step.forest)
    return model.head(hidden)


@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing(tiny_shape, method):
    step = batch(tiny_shape).step
    want = logits(random_model(tiny_shape, torch.float32), step)
    got = logits(adapted(tiny_shape, method, moved=False)[0], step)
    # PiSSA takes its matrices out of the base in fp32, and their product comes back with its rounding.
    assert torch.equal(got, want) if method != "pissa" else torch.allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_frozen_matrices_in_bf16_change_no_bit(tiny_shape, method):
    step = batch(tiny_shape).step
    plain = random_model(tiny_shape, torch.float32)
    plain.compute_dtype = torch.bfloat16
    model = random_model(tiny_shape, torch.float32)
    model.compute_dtype = torch.bfloat16
    add_adapter(model, planned(model, method))
    assert model.emb.weight.dtype == model.head.weight.dtype == model.blocks[1].att.key.base_layer.weight.dtype == torch.bfloat16
    assert model.blocks[0].ln1.weight.dtype == model.blocks[0].att.time_decay.dtype == torch.float32
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert torch.equal(logits(model, step), logits(plain, step))


def materialised(model, method):
    """The plain model's weights as functions of the adapter's, in plain autograd."""
    parameters = dict(model.named_parameters())
    weights = {}
    for name, p in parameters.items():
        if ".lora_" in name:
            continue
        if not name.endswith(".base_layer.weight"):
            weights[name] = p
            continue
        prefix = name.removesuffix("base_layer.weight")
        a, b = (parameters[f"{prefix}lora_{x}.default.weight"] for x in "AB")
        weight = p + ALPHA / (R**0.5 if method == "rslora" else R) * b @ a
        if method == "dora":
            weight = weight * (parameters[f"{prefix}lora_magnitude_vector.default.weight"] / weight.detach().norm(dim=1))[:, None]
        weights[f"{prefix}weight"] = weight
    return weights


@pytest.mark.parametrize("grad_cp", ["0", "1"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_materialised_weights(tiny_shape, method, grad_cp):
    model, _ = adapted(tiny_shape, method, torch.float64, grad_cp=grad_cp, extra="time,ln,head")
    plain = random_model(tiny_shape, torch.float64)
    loss, _ = objective(model, batch(tiny_shape), dpo(0.3), 0.5)
    got = torch.autograd.grad(loss, list(trained(model).values()))
    want_loss, _ = objective(Materialised(plain, materialised(model, method)), batch(tiny_shape), dpo(0.3), 0.5)
    want = torch.autograd.grad(want_loss, list(trained(model).values()))
    # float64 sums of a few hundred terms, in another order.
    torch.testing.assert_close(loss, want_loss, rtol=1e-9, atol=1e-9)
    for name, g, w in zip(trained(model), got, want, strict=True):
        assert w.any(), name
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_computes_what_pefts_own_layer_does(method, dropout, training):
    def layer(kind, register):
        torch.manual_seed(0)
        net = nn.Sequential(kind)
        nn.init.normal_(net[0].weight)
        config = LoraConfig(
            r=3, lora_alpha=5, lora_dropout=dropout, target_modules=["0"], use_dora=method == "dora", use_rslora=method == "rslora",
            init_lora_weights="pissa" if method == "pissa" else "gaussian",
        )  # fmt: skip
        if register:
            from rwkv_dpo.tuning.adapted_linear import AdaptedLinear

            config._register_custom_module({Linear: AdaptedLinear})
        inject_adapter_in_model(config, net)
        with torch.no_grad():
            net[0].lora_B["default"].weight.add_(0.1)
        return net.double().train(training)

    x = torch.randn(11, 8, dtype=torch.float64)
    results = []
    for net in (layer(Linear(8, 6), True), layer(nn.Linear(8, 6, bias=False), False)):
        inputs = x.clone().requires_grad_()
        torch.manual_seed(7)
        y = net(inputs)
        results.append((y, *torch.autograd.grad(y.square().sum(), [inputs, *trained(net).values()])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_an_adapter_keeps_r_numbers_a_token_for_the_backward_pass(tiny_shape):
    def kept(model):
        sizes, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x):
            if x.untyped_storage().data_ptr() not in own:
                sizes[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden, _ = model(step.forest)
        assert hidden.requires_grad
        return sum(size for size, _ in sizes.values())

    step = collate([np.arange(51) % 61], [], np.zeros((0, 2))).step
    plain, model = random_model(tiny_shape, torch.float32), adapted(tiny_shape, "lora")[0]
    n_projections = 8 * tiny_shape.n_layer
    assert kept(model) - kept(plain) <= 4 * 50 * R * n_projections


@pytest.mark.parametrize("method", METHODS)
def test_peft_itself_loads_the_folder_and_merges_it_into_the_same_model(tiny_shape, method, tmp_path):
    model, adapter = adapted(tiny_shape, method, extra="time,ln", targets="att.key,ffn.value,gate", layers="1")
    adapter.save(trained(model), tmp_path, "final")
    step = batch(tiny_shape).step
    want = logits(model.eval(), step)

    plain = random_model(tiny_shape, torch.float32)
    assert not torch.allclose(logits(plain, step), want, atol=1e-2)
    merged = PeftModel.from_pretrained(plain, tmp_path / "adapter-final").merge_and_unload()
    # fp32 products in another order; for PiSSA the base is restored by adding what was taken out.
    torch.testing.assert_close(logits(merged, step), want, rtol=0, atol=5e-5)

    ours = random_model(tiny_shape, torch.float32)
    ours.load_state_dict(merged_weights(model))
    torch.testing.assert_close(logits(ours, step), want, rtol=0, atol=5e-5)
    assert sorted(p.name for p in (tmp_path / "adapter-final").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_goes_on_where_it_was_saved(tiny_shape, method, tmp_path):
    model, adapter = adapted(tiny_shape, method, extra="ln", targets="key", layers="1")
    adapter.save(trained(model), tmp_path, "0")
    settings = TuningSettings(peft=method, peft_load=str(tmp_path / "adapter-0"))
    again = random_model(tiny_shape, torch.float32)
    continued = begin_tuning(again, settings, frozenset({"peft"}))
    assert trained(again).keys() == trained(model).keys()
    for name, p in trained(again).items():
        assert torch.equal(p, trained(model)[name]), name
    # To the bit: the same operations on the same numbers, PiSSA's frozen matrices among them.
    step = batch(tiny_shape).step
    assert torch.equal(logits(again, step), logits(model, step))
    continued.save(trained(again), tmp_path, "1")
    run = load_tuned(random_model(tiny_shape, torch.float32), tmp_path / "adapter-1")
    assert torch.equal(logits(run, step), logits(model.eval(), step))
    assert not trained(run)


def test_targets_layers_and_extras_choose_what_trains(tiny_shape):
    def names(**plan):
        model, _ = adapted(tiny_shape, "lora", moved=False, **plan)
        return set(trained(model))

    assert len(names()) == 2 * 8 * tiny_shape.n_layer
    assert names(targets="att.key", layers="1") == {f"blocks.1.att.key.lora_{x}.default.weight" for x in "AB"}
    assert {name.split(".")[2] for name in names(targets="receptance", layers="0")} == {"att", "ffn"}
    extra = names(targets="gate", extra="time, emb") - names(targets="gate")
    assert "emb.weight" in extra
    assert "blocks.0.ffn.time_mix_k" in extra
    assert all(".time_" in name for name in extra - {"emb.weight"})
    norms = names(targets="gate", extra="ln") - names(targets="gate")
    assert {"ln_out.bias", "blocks.0.ln0.weight", "blocks.1.att.ln_x.bias"} < norms
    assert parse_layers("0-2, 5", 8) == {0, 1, 2, 5}


@pytest.mark.parametrize(("plan", "message"), [
    ({"targets": "query"}, "--lora_targets query: unknown; accepted are att.gate, att.key, .*, value"),
    ({"targets": "ffn.gate"}, "--lora_targets ffn.gate: unknown"),
    ({"targets": ","}, "--lora_targets is empty"),
    ({"layers": "1-2"}, "--lora_layers 1-2: not layers of this model; .* within 0-1"),
    ({"layers": "all"}, "--lora_layers all: not layers"),
    ({"extra": "bias"}, "--train_extra bias: unknown; accepted are time, lowrank, ln, emb, head"),
    ({"extra": "lowrank"}, "--train_extra lowrank: an RWKV-5 has no such weights"),
], ids=str)  # fmt: skip
def test_unknown_names_are_refused_with_the_known_ones(tiny_shape, plan, message):
    with pytest.raises(InputError, match=message):
        planned(random_model(tiny_shape, torch.float32), "lora", **plan)


def test_pissa_refuses_a_rank_above_the_matrices(tiny_shape):
    model = random_model(tiny_shape, torch.float32)
    with pytest.raises(InputError, match="--lora_r 33: with --peft pissa up to the smallest side of the matrices, 32"):
        add_adapter(model, plan_adapter(model, "pissa", 33, 1, 0.0, ALL, "", ""))


@pytest.fixture
def folder(tiny_shape, tmp_path):
    model, adapter = adapted(tiny_shape, "lora", targets="key")
    adapter.save(trained(model), tmp_path, "0")
    return tmp_path / "adapter-0"


@pytest.mark.parametrize(("flags", "message"), [
    ({"peft": "dora"}, r"--peft dora \(it holds lora\)"),
    ({"lora_r": 8}, r"--lora_r 8 \(it has 4\)"),
    ({"lora_alpha": 8}, r"--lora_alpha 8 \(it has 6\)"),
    ({"lora_targets": "att.key"}, r"--lora_targets and --lora_layers \(blocks.0.ffn.key is in it\)"),
    ({"lora_targets": "key,gate"}, r"\(blocks.0.att.gate is not in it\)"),
    ({"lora_layers": "1"}, r"\(blocks.0.att.key is in it\)"),
], ids=str)  # fmt: skip
def test_flags_that_contradict_the_folder_are_refused(tiny_shape, folder, flags, message):
    settings = TuningSettings(**{"peft": "lora", "peft_load": str(folder), **flags})
    with pytest.raises(InputError, match=f"adapter-0: contradicts .*{message}"):
        begin_tuning(random_model(tiny_shape, torch.float32), settings, frozenset(flags))


def edit_config(**changes):
    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def rewrite(change):
    def edit(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return edit


A0 = "base_model.model.blocks.0.att.key.lora_A.weight"


@pytest.mark.parametrize(("edit", "message"), [
    (lambda f: shutil.rmtree(f), "adapter_config.json: no such file; an adapter is a folder with"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such file"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"torn"), "not a readable safetensors file"),
    (lambda f: (f / "adapter_config.json").write_text("{"), "not readable as JSON"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
    (edit_config(peft_type="IA3"), "has peft_type 'IA3'; 'LORA' is accepted"),
    (edit_config(rank_pattern={"key": 3}), "has rank_pattern"),
    (edit_config(r="many"), "not a LoRA adapter"),
    (edit_config(init_lora_weights="pissa"), "its base model was changed at the start"),
    (rewrite(lambda t: t.pop(A0)), "blocks.0.att.key.lora_B.weight is unexpected"),
    (rewrite(lambda t: t.clear()), "not a LoRA adapter"),
    (rewrite(lambda t: t.update({A0: torch.zeros(4, 64)})), r"another shape: blocks.0.att.key.lora_A.w.* \(4, 64\) instead of \(4, 32\)"),
    (rewrite(lambda t: t.update({A0: torch.zeros(3, 32)})), r"blocks.0.att.key.lora_A.weight has shape \(3, 32\), and .* r 4"),
    (rewrite(lambda t: t.update({A0: torch.zeros(4)})), r"blocks.0.att.key.lora_A.weight has shape \(4,\), and .* r 4"),
    (edit_config(r=10**9), "has shape .*, and adapter_config.json r 1000000000"),
    (rewrite(lambda t: t.update({A0.replace("lora_A.weight", "lora_embedding_A"): torch.zeros(4, 4)})), "lora_embedding_A has shape"),
    (rewrite(lambda t: t.update({A0.replace(".0.", ".9.").replace("_A", x): torch.zeros(4, 4) for x in ("_A", "_B")})),
     r"an adapter of another model: this one has no blocks.9.att.key \(layers 0-1\)"),
    (rewrite(lambda t: t.update({"base_model.model.blocks.0.att.x_r": torch.zeros(4)})), r"blocks.0.att.x_r \(4,\) is not a weight of"),
])  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused(tiny_shape, folder, edit, message):
    edit(folder)
    with pytest.raises(InputError, match=message) as error:
        load_tuned(random_model(tiny_shape, torch.float32), folder) if folder.exists() else read_adapter(folder)
    assert "\n" not in str(error.value)


def test_saving_over_a_folder_replaces_it_whole(tiny_shape, folder):
    model, adapter = adapted(tiny_shape, "lora", targets="gate")
    (folder / "stale").write_text("")
    adapter.save(trained(model), folder.parent, "0")
    assert {p.name for p in folder.parent.iterdir()} == {"adapter-0"}
    assert not (folder / "stale").exists()
    assert read_adapter(folder).modules == ("blocks.0.att.gate", "blocks.1.att.gate")
