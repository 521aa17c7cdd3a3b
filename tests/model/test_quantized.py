"""Matrices in 8 and 4 bits against bitsandbytes' own, and models that hold them against models whose weights are what they hold."""

import logging
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.batches.micro_batch import collate
from rwkv_dpo.model.checkpoint import load_into, load_model, save_weights
from rwkv_dpo.model.linear import Linear
from rwkv_dpo.model.quantized import FORMS, QuantizedLinear, quantize, quantized
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.objective.objective import objective
from rwkv_dpo.tuning.adapter_files import METHODS
from rwkv_dpo.tuning.adapters import add_adapter, merged_weights, plan_adapter
from rwkv_dpo.tuning.settings import TuningSettings
from rwkv_dpo.tuning.states import add_states
from rwkv_dpo.tuning.tuning import begin_tuning

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
import bitsandbytes  # noqa: E402 (quietly)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPE = ModelShape(n_layer=2, n_embd=32, dim_att=32, dim_ffn=96, vocab_size=61, head_size=8)
# Blocks of 64 numbers go on from row to row. They are 1,728, which is no multiple of 256.
ROWS, COLUMNS = 1152, 96


def values(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (0.05 * torch.randn(ROWS, COLUMNS, generator=generator) * torch.rand(ROWS, 1, generator=generator)).to(dtype)


def held(form, matrix):
    made = FORMS[form](tuple(matrix.shape))
    made.copy_(matrix)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [COLUMNS, 128])
def test_nf4_is_what_a_layer_of_bitsandbytes_holds(dtype, columns):
    """Of a matrix whose rows are the blocks, since their CPU code misreads blocks that go on from row to row."""
    rows = values().view(-1, 64)
    theirs = bitsandbytes.nn.Params4bit(rows, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
    theirs.quant_state.dtype = dtype
    want = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    got = held("nf4", values().view(-1, columns)).to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got, want.view_as(got))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_what_bitsandbytes_makes_of_the_whole_matrix(dtype, monkeypatch):
    monkeypatch.setattr("rwkv_dpo.model.quantized.CPU_CHUNK", 100 * COLUMNS)  # the last of them smaller
    codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(values())
    want = bitsandbytes.functional.int8_vectorwise_dequant(codes, scales).to(dtype)
    assert torch.equal(held("int8", values()).to(dtype), want)


def test_what_is_lost_is_what_the_forms_lose():
    """int8 is off by up to half a step, of which a row's largest number has 127. Of nf4's 16 values the first two are furthest apart, by
    0.304 of a block's largest number; 8 bits of that are off by some hundredths."""
    matrix = values()
    off = (held("int8", matrix).to(torch.float32) - matrix).abs()
    assert (off <= matrix.abs().amax(1, keepdim=True) / 127 * 0.5001).all()
    blocks = matrix.view(-1, 64)
    off = (held("nf4", matrix).to(torch.float32) - matrix).view(-1, 64).abs()
    assert (off <= 0.152 * blocks.abs().amax(1, keepdim=True) + 0.02 * blocks.abs().amax()).all()
    assert held("nf4", matrix).nbytes / matrix.numel() == pytest.approx(FORMS["nf4"].bytes_a_number(COLUMNS), abs=0.02)
    assert held("int8", matrix).nbytes / matrix.numel() == FORMS["int8"].bytes_a_number(COLUMNS)


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zeros_and_what_is_not_finite_is_not_hidden(form):
    """New models have matrices of zeros."""
    assert not held(form, torch.zeros(64, 64)).to(torch.float32).any()
    bad = values()
    bad[3, 5] = np.nan
    assert held(form, bad).to(torch.float32)[3].isnan().any()


def tuned(method, form, version="5", **options):
    """A model with an adapter or states that have moved, beside matrices in that form."""
    model = random_model(SHAPE, torch.float32, version=version, grad_cp=options.pop("grad_cp", "0"))
    torch.manual_seed(1)
    if method == "state":
        add_states(model, quant=form)
    else:
        targets = "receptance,key,value,output" if version == "7" else "key,gate"
        dropout = options.get("dropout", 0.0)
        add_adapter(model, plan_adapter(model, method, 4, 6, dropout, targets, "", "ln"), quant=form)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trained(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def dense_twin(model, method, **options):
    """A model of plain matrices: those that `model` holds in fewer bits, and its trained weights."""
    twin = tuned(method, "none", **options)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, value in {**dict(model.named_parameters()), **quantized(model)}.items():
            own[name].copy_(value.to(torch.float32))
    assert own.keys() == {**dict(model.named_parameters()), **quantized(model)}.keys()
    return twin


def loss_and_gradients(model, chunk_ctx=0):
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.integers(0, 61, n) for n in (20, 4, 7)) for _ in range(2)]
    batch = collate([rng.integers(0, 61, 40)], pairs, np.full((2, 2), -20.0), chunk_ctx)
    torch.manual_seed(3)
    loss, _ = objective(model, batch, dpo(0.3), 0.5)
    return loss, torch.autograd.grad(loss, list(trained(model).values()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("method", "options"), [
    *((method, {}) for method in (*METHODS, "state")), ("lora", {"version": "6"}), ("dora", {"version": "7"}), ("state", {"version": "7"}),
    ("lora", {"grad_cp": "1"}), ("dora", {"dropout": 0.3}), ("lora", {"dropout": 0.3}),
], ids=str)  # fmt: skip
def test_loss_and_all_gradients_are_those_of_a_model_of_the_very_matrices(form, method, options):
    model = tuned(method, form, **options)
    twin = dense_twin(model, method, **options)
    assert len(quantized(model)) == sum(type(module) is Linear for module in twin.modules()) > 0
    loss, gradients = loss_and_gradients(model)
    want_loss, want = loss_and_gradients(twin)
    # The same operations in fp32; the matrices lie elsewhere in memory.
    torch.testing.assert_close(loss, want_loss, rtol=1e-6, atol=0)
    for name, one, other in zip(trained(model), gradients, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0


@pytest.mark.parametrize("form", FORMS)
def test_chunks_have_the_same_gradients(form):
    whole, chunked = (loss_and_gradients(tuned("lora", form), n)[1] for n in (0, 16))
    for one, other in zip(whole, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_new_adapter_changes_nothing_and_pissa_brings_the_base_nearer(form, method):
    """QPiSSA: what is held in fewer bits is what the adapter leaves, which is smaller (Meng et al. 2024, arXiv:2404.02948)."""
    def products(model):
        torch.manual_seed(0)
        x = torch.randn(50, 32)
        return torch.stack([block.att.key(x) for block in model.blocks])

    plain, bare, model = (random_model(SHAPE, torch.float32) for _ in range(3))
    quantize(bare, form)
    add_adapter(model, plan_adapter(model, method, 16, 16, 0.0, "key", "", ""), quant=form)
    with torch.no_grad():
        if method == "pissa":
            off, off_bare = ((products(one) - products(plain)).norm() for one in (model, bare))
            assert off < 0.8 * off_bare
        else:
            torch.testing.assert_close(products(model), products(bare), rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", ["5", "6", "7"])
def test_a_model_is_loaded_in_fewer_bits_with_the_rest_as_it_was(form, version, tmp_path):
    plain = random_model(SHAPE, torch.float32, version=version)
    save_weights(plain.state_dict(), tmp_path / "m.pth")
    model = load_model(tmp_path / "m.pth", device=torch.device("cpu"), compute_dtype=torch.bfloat16, wkv_backend="reference", quant=form)
    projections = {name for name, module in plain.named_modules() if isinstance(module, Linear)}
    assert {f"{name}.weight" for name in projections} == quantized(model).keys()
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in model.named_parameters())
    for name, matrix in quantized(model).items():
        assert torch.equal(matrix.to(torch.float32), held(form, plain.get_parameter(name)).to(torch.float32))
    with pytest.raises(InputError, match=r"there.pth: missing blocks.1.att.key.weight"):
        load_into(model, {n: w for n, w in plain.state_dict().items() if n != "blocks.1.att.key.weight"}, "there.pth")


@pytest.mark.parametrize("form", FORMS)
def test_scales_stay_fp32_and_the_fingerprint_of_weights_sees_every_part(form):
    model = random_model(SHAPE, torch.float32)
    quantize(model, form)
    before = {name: {part: x.clone() for part, x in matrix.parts.items()} for name, matrix in quantized(model).items()}
    model.half()  # as DeepSpeed does with a model that computes in fp16
    assert model.emb.weight.dtype == torch.float16
    for name, matrix in quantized(model).items():
        assert all(torch.equal(part, before[name][key]) for key, part in matrix.parts.items())
        assert {f"{name}.{part}" for part in matrix.parts} <= model.state_dict().keys()
    meta = QuantizedLinear(form, 64, 64)
    meta.matrix.copy_(torch.randn(64, 64))
    assert {part.device.type for part in meta.to("meta").matrix.parts.values()} == {"meta"}


@pytest.mark.parametrize(("method", "most"), [("lora", 0), ("dora", 2)])
def test_an_adapter_begins_without_making_matrices_time_and_again(method, most, monkeypatch):
    """peft asks for weights where it needs a device or a size. DoRA begins with the norms of their rows."""
    made = []
    whole = QuantizedLinear.weight.fget
    monkeypatch.setattr(QuantizedLinear, "weight", property(lambda self: (made.append(self), whole(self))[1]))
    model = random_model(SHAPE, torch.float32)
    quantize(model, "int8")
    add_adapter(model, plan_adapter(model, method, 4, 6, 0.0, "key,value", "", ""), quant="int8")
    assert len(made) == most * 4 * SHAPE.n_layer


def test_nothing_is_kept_of_a_matrix_that_a_product_has_made():
    model = tuned("lora", "nf4")
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = tuple(x.shape)
        return x

    step = collate([np.arange(50) % 61], [], np.zeros((0, 2))).step
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden, _ = model(step.forest)
    assert hidden.requires_grad
    assert not {shape for shape in sizes.values() if shape in {(32, 32), (96, 32), (32, 96)}}


def test_without_bitsandbytes_it_is_refused(monkeypatch):
    model = random_model(SHAPE, torch.float32)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="--quant nf4 needs the package bitsandbytes"):
        quantize(model, "nf4")


def test_a_folder_that_trains_a_projection_as_a_whole_is_refused(tmp_path):
    model = random_model(SHAPE, torch.float32)
    plan = plan_adapter(model, "lora", 4, 6, 0.0, "att.key", "", "")
    whole = {"blocks.0.ffn.value.weight": model.blocks[0].ffn.value.weight.detach().clone()}
    adapter = add_adapter(model, plan)
    replace(adapter, plan=replace(plan, extra=tuple(whole))).save({**trained(model), **whole}, tmp_path, "final")
    settings = TuningSettings(peft="lora", quant="int8", peft_load=str(tmp_path / "adapter-final"))
    base = random_model(SHAPE, torch.float32)
    quantize(base, "int8")
    with pytest.raises(InputError, match=r"adapter-final: trains blocks.0.ffn.value.weight as a whole, which --quant holds in fewer bits"):
        begin_tuning(base, settings, frozenset())
    begin_tuning(random_model(SHAPE, torch.float32), replace(settings, quant="none"), frozenset())


def test_weights_are_merged_into_files_and_not_into_what_is_held():
    model = tuned("lora", "int8")
    with pytest.raises(InputError, match="--quant"):
        merged_weights(model)
