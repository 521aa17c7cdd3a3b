"""Training adapters and states through train.py, on tiny models and CPU."""

import numpy as np
import pytest
import torch
from conftest import random_model
from materialised import Materialised
from runs import TINY, flags
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.data.corpus import open_corpus
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.evaluation.scoring import score_pairs
from rwkv_dpo.files.hashed import file_sha256
from rwkv_dpo.model.checkpoint import load_model, read_weights, save_weights
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective.losses import mixture_of
from rwkv_dpo.objective.objective import objective
from rwkv_dpo.run.data import RunData
from rwkv_dpo.run.flags import parse_flags
from rwkv_dpo.run.model import build_model, resolve_shape
from rwkv_dpo.run.settings import settings_of
from rwkv_dpo.run.trainer import loader_of
from rwkv_dpo.tuning.adapter_files import read_adapter
from rwkv_dpo.tuning.settings import TuningSettings
from rwkv_dpo.tuning.tuning import begin_tuning, load_tuned
from test_train import run

METHODS = ("lora", "dora", "pissa", "rslora", "state")
# For runs that are compared: above the rounding of gradients (1e-9), by which Adam would divide others and move such weights anywhere.
ADAM_EPS = 1e-5


@pytest.fixture
def small(data):
    """Flags of a run whose adapters have rank 4; --peft state takes no adapter's flags."""
    return lambda method, **changes: {"peft": method, **({} if method == "state" else {"lora_r": 4, "lora_alpha": 8}), **changes}


def saved_as(proj_dir, method, label="final"):
    return proj_dir / (f"state-{label}.pth" if method == "state" else f"adapter-{label}")


def logits_of(data, path=None):
    model = load_model(data / "model.pth", device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="chunked")
    if path is not None:
        load_tuned(model, path)
    builder = ForestBuilder()
    builder.add(np.arange(1, 20))
    with torch.no_grad():
        return model.head(model(builder.build()[0])[0])


@pytest.mark.parametrize(("changes", "in_fp32"), [
    ({"peft": "state"}, set()), ({"peft": "dora"}, set()), ({"peft": "lora", "train_extra": "time"}, {"emb", "head"}),
    ({"peft": "pissa"}, {"emb", "head", "key"}), ({}, {"emb", "head", "key"}),
])  # fmt: skip
def test_matrices_that_do_not_train_are_loaded_without_an_fp32_copy(data, tmp_path, changes, in_fp32):
    settings, given = parse_flags(flags(data, tmp_path, precision="bf16", **changes))
    model = build_model(settings, *resolve_shape(settings, given), torch.device("cpu"))
    matrices = {"emb": model.emb, "head": model.head, "key": model.blocks[1].ffn.key}
    assert {name for name, module in matrices.items() if module.weight.dtype == torch.float32} == in_fp32
    assert model.blocks[1].att.time_decay.dtype == torch.float32
    begin_tuning(model, settings.tuning, given)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("grad_cp", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_begins_at_the_reference_learns_and_saves_what_it_trained_alone(data, tmp_path, small, caplog, method, grad_cp):
    rate = 0.1 if method == "state" else 1e-3
    with caplog.at_level("INFO"):
        records = run(data, tmp_path, dpo_valid_file=data / "valid.save", **small(method, grad_cp=grad_cp, lr_init=rate, lr_final=rate))
    margin = next(line for line in caplog.text.splitlines() if "mean |margin|" in line)
    assert float(margin.split("pairs ")[1].split()[0]) < 1e-4
    assert "not the one that scored" not in caplog.text
    assert records[0]["loss_dpo"] == pytest.approx(np.log(2), abs=1e-4)
    assert records[-1]["rewards/margins"] > records[0]["rewards/margins"] + 1e-4
    tuned = {saved_as(tmp_path, method, label).name for label in ("init", "0", "1", "final")}
    tuned |= {f"{name}.sha256" for name in tuned if name.endswith(".pth")}
    end = f"{'state' if method == 'state' else 'adapter'}-final.json"
    always = {"config.json", "metrics.jsonl", "train_log.txt", "valid.jsonl", "report.html", "curves.png"}
    assert {p.name for p in tmp_path.iterdir()} == {*always, end, *tuned}
    assert (logits_of(data, saved_as(tmp_path, method)) - logits_of(data)).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(data, saved_as(tmp_path, method, "init")), logits_of(data), rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_train_the_same(data, tmp_path, small, method):
    plain, chunked = (
        run(data, tmp_path / f"chunks of {n}", ctx_len=40, **small(method, chunk_ctx=n, adam_eps=ADAM_EPS)) for n in (0, 16)
    )
    # Two steps in fp32 whose sums come in another order.
    assert [r["loss"] for r in chunked] == pytest.approx([r["loss"] for r in plain], rel=1e-5)
    assert [r["grad_norm"] for r in chunked] == pytest.approx([r["grad_norm"] for r in plain], rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_and_ddp_train_the_same(data, tmp_path, small, method):
    ways = {"grad_cp": ({"grad_cp": 1}, 1e-5)} | ({"ddp": ({"strategy": "ddp"}, 1e-6)} if method in ("lora", "state") else {})

    def trained(name, **way):
        run(data, tmp_path / name, **small(method, epoch_count=1, adam_eps=ADAM_EPS, **way))
        return logits_of(data, saved_as(tmp_path / name, method))

    plain = trained("plain")
    for name, (way, tolerance) in ways.items():
        torch.testing.assert_close(trained(name, **way), plain, rtol=0, atol=tolerance)


def test_lora_trains_as_a_hand_written_parametrization_does(data, tmp_path):
    given = {"peft": "lora", "lora_r": 4, "lora_alpha": 8, "train_extra": "ln", "lr_init": 1e-2, "lr_final": 1e-2, "epoch_count": 1,
             "weight_decay": 0.1, "adam_eps": ADAM_EPS}  # fmt: skip
    run(data, tmp_path, **given)
    got = read_adapter(tmp_path / "adapter-final")

    settings, names = parse_flags(flags(data, tmp_path, **given))
    torch.manual_seed(settings.general.seed)
    model = build_model(settings, TINY, read_weights(data / "model.pth"), torch.device("cpu"))
    begin_tuning(model, settings.tuning, names)  # for A's start alone; what follows knows no adapter
    start = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    plain = random_model(TINY, torch.float32)
    base = read_weights(data / "model.pth")

    def weights():
        made = {}
        for name, value in base.items():
            prefix = name.removesuffix("weight")
            made[name] = start.get(name, value)
            if f"{prefix}lora_A.default.weight" in start:
                made[name] = value + 2.0 * start[f"{prefix}lora_B.default.weight"] @ start[f"{prefix}lora_A.default.weight"]
        return made

    matrices = [p for p in start.values() if p.dim() > 1]
    vectors = [p for p in start.values() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=ADAM_EPS)
    corpus = open_corpus(str(data / "corpus.bin"), "uint16", TINY.vocab_size, settings.data.ctx_len)
    batches = loader_of(settings, RunData(corpus, load_pairs(data / "train.save", TINY.vocab_size)), 0, on_gpu=False).dataset
    for k in range(settings.epochs.epoch_steps):
        optimizer.zero_grad()
        (batch,) = batches[k]
        objective(Materialised(plain, weights()), batch, mixture_of(settings.objective), settings.objective.ratio)[0].backward()
        torch.nn.utils.clip_grad_norm_(list(start.values()), 1.0)
        optimizer.step()
    assert set(got.tensors) | set(got.extra) == {name.replace(".default", "") for name in start}
    for name, p in start.items():
        value = (got.tensors | got.extra)[name.replace(".default", "")]
        # Rounding over the epsilon is a ten-thousandth of the rate of 1e-2 in each of 4 steps.
        torch.testing.assert_close(value, p.detach(), rtol=1e-4, atol=3e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("method", METHODS)
def test_bf16_keeps_the_trained_weights_in_fp32(data, tmp_path, small, method):
    rate = 1e-4 if method == "state" else 1e-6
    run(data, tmp_path, **small(method, precision="bf16", lr_init=rate, lr_final=rate, epoch_count=1))
    change = (logits_of(data, saved_as(tmp_path, method)) - logits_of(data)).abs().max()
    assert 0 < change < 0.01


@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_from_what_was_saved(data, tmp_path, small, caplog, method):
    rate = 0.1 if method == "state" else 1e-3
    run(data, tmp_path / "first", **small(method, lr_init=rate, lr_final=rate))
    saved = saved_as(tmp_path / "first", method)
    run(data, tmp_path / "second", peft=method, peft_load=saved, lr_init=1e-9, lr_final=1e-9, epoch_count=1)
    # Steps of 1e-9 leave it where it was.
    torch.testing.assert_close(logits_of(data, saved_as(tmp_path / "second", method)), logits_of(data, saved), rtol=0, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pissa_is_taken_up_again_from_its_saved_start_to_the_bit(data, tmp_path, precision):
    """Its frozen matrices are W - s B A, by the same product of the same numbers, and rounded to bf16 once."""
    given = {"peft": "pissa", "lora_r": 4, "lora_alpha": 6, "precision": precision}
    run(data, tmp_path, **given, epoch_count=1)
    settings = settings_of({"load_model": str(data / "model.pth"), "wkv_backend": "chunked", **given})

    def frozen(seed, start=""):
        torch.manual_seed(seed)
        model = build_model(settings, TINY, read_weights(data / "model.pth"), torch.device("cpu"))
        begin_tuning(model, settings.tuning, frozenset(), start)
        return [module.base_layer.weight for block in model.blocks for module in (block.att.key, block.ffn.value)]

    # The decomposition of the run, with its seed; what another seed gives shows that the saved start counts.
    began, other = frozen(0), frozen(5)
    again = frozen(5, str(tmp_path / "adapter-init"))
    assert all(map(torch.equal, began, again))
    assert not any(map(torch.equal, began, other))


CHANGES = [
    {"lora_r": 2}, {"lora_alpha": 32}, {"lora_dropout": 0.5}, {"lora_targets": "att.key"}, {"lora_layers": "1"}, {"train_extra": "time"},
    {"peft": "dora"}, {"peft": "rslora"}, {"peft": "pissa"},
]  # fmt: skip


@pytest.fixture(scope="module")
def lora(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    run(data, folder, peft="lora", lora_r=4, lora_alpha=8, epoch_count=1, lr_init=1e-2)
    return logits_of(data, folder / "adapter-final")


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_flag_changes_the_result(data, tmp_path, lora, changes):
    run(data, tmp_path, **{"peft": "lora", "lora_r": 4, "lora_alpha": 8, "epoch_count": 1, "lr_init": 1e-2, **changes})
    assert (logits_of(data, tmp_path / "adapter-final") - lora).abs().max() > 1e-3


BAD = [
    ({"peft": "ia3"}, "--peft 'ia3': accepted are"),
    ({"peft": "lora", "lora_r": 0}, "--lora_r 0: at least 1"),
    ({"peft": "lora", "lora_dropout": 1}, "--lora_dropout 1.0: 0 or more and below"),
    ({"peft": "lora", "lora_targets": "att.query"}, "--lora_targets att.query: unknown; accepted are att.gate, att.key"),
    ({"peft": "lora", "lora_layers": "0-2"}, "--lora_layers 0-2: not layers of this model"),
    ({"peft": "lora", "train_extra": "all"}, "--train_extra all: unknown; accepted are time, lowrank, ln, emb, head"),
    ({"peft": "lora", "load_model": None}, "--peft lora needs --load_model"),
    ({"peft": "lora", "load_partial": 1}, "--load_partial 1: --peft lora needs a checkpoint"),
    ({"peft": "pissa", "weight_decay": 0.1}, "--weight_decay with --peft pissa"),
    ({"peft": "lora", "peft_load": "nowhere"}, r"nowhere/adapter_config.json: no such file"),
    ({"peft": "state", "peft_load": "nowhere.pth"}, r"nowhere.pth: no such checkpoint"),
    ({"peft_load": "x"}, "--peft_load x needs the --peft"),
    ({"lora_r": 8}, "--lora_r 8: --peft none trains no adapter"),
    ({"peft": "state", "train_extra": "ln"}, "--train_extra ln: --peft state trains no adapter"),
    ({"peft": "state", "strategy": "deepspeed_stage_3"}, "--strategy deepspeed_stage_3: DeepSpeed doesn't shard weights that --peft"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_bad_input_is_refused_before_anything_is_written(data, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        run(data, tmp_path / "out", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_states_and_adapters_of_another_shape_are_refused(data, tmp_path, small):
    other = random_model(ModelShape(n_layer=2, n_embd=64, dim_att=64, dim_ffn=96, vocab_size=61, head_size=8), torch.float32)
    for method in ("lora", "state"):
        settings = TuningSettings(peft=method)
        model = random_model(other.shape, torch.float32)
        tuning = begin_tuning(model, settings, frozenset())
        tuning.save({name: p for name, p in model.named_parameters() if p.requires_grad}, tmp_path, "0")
        with pytest.raises(InputError, match="another"):
            run(data, tmp_path / "out", peft=method, peft_load=saved_as(tmp_path, method, "0"))
    save_weights(other.state_dict(), tmp_path / "model.pth")
    with pytest.raises(InputError, match="not a state file"):
        run(data, tmp_path / "out", peft="state", peft_load=tmp_path / "model.pth")


@pytest.fixture(scope="module")
def stateful(data, tmp_path_factory):
    """A checkpoint with tuned states, as RWKV-Runner's users merge them, and pairs that it scored."""
    path = tmp_path_factory.mktemp("stateful") / "model.pth"
    weights = torch.load(data / "model.pth", weights_only=True)
    generator = torch.Generator().manual_seed(4)
    weights |= {f"blocks.{layer}.att.time_state": torch.randn(4, 8, 8, generator=generator) for layer in range(TINY.n_layer)}
    torch.save(weights, path)
    model = load_model(path, device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="chunked")
    pairs = load_pairs(data / "train.save")
    save_pairs(path.parent / "train.save", pairs.with_ref_logps(score_pairs(model, pairs, 100), file_sha256(path), "fp32"))
    return path.parent


def test_a_checkpoint_with_states_trains_whole_from_them(data, stateful, tmp_path):
    inputs = {"load_model": stateful / "model.pth", "dpo_train_file": stateful / "train.save"}
    records = run(data, tmp_path / "out", **inputs)
    assert records[0]["loss_dpo"] == pytest.approx(np.log(2), abs=1e-4)  # the model is the reference
    before, after = (torch.load(path, weights_only=True) for path in (stateful / "model.pth", tmp_path / "out" / "rwkv-final.pth"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    chunked = run(data, tmp_path / "chunked", chunk_ctx=16, ctx_len=40, **inputs)
    plain = run(data, tmp_path / "plain", ctx_len=40, **inputs)
    assert [r["loss"] for r in chunked] == pytest.approx([r["loss"] for r in plain], rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "state"])
def test_a_checkpoint_with_states_is_tuned_from_them(data, stateful, tmp_path, small, method):
    inputs = {"load_model": stateful / "model.pth", "dpo_train_file": stateful / "train.save"}
    records = run(data, tmp_path, **small(method, **inputs))
    assert records[0]["loss_dpo"] == pytest.approx(np.log(2), abs=1e-4)
    states = {n: x for n, x in torch.load(stateful / "model.pth", weights_only=True).items() if n.endswith("time_state")}
    if method == "state":
        first = torch.load(tmp_path / "state-init.pth", weights_only=True)
        assert all(torch.equal(first[name], states[name]) for name in states)
    model = load_model(stateful / "model.pth", device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="chunked")
    load_tuned(model, saved_as(tmp_path, method))
    kept = {name: torch.equal(model.get_parameter(name), states[name]) for name in states}
    assert set(kept.values()) == {method == "lora"}


def test_stage_3_takes_no_states(data, stateful, tmp_path):
    with pytest.raises(InputError, match=r"--strategy deepspeed_stage_3: .*model.pth has tuned states"):
        run(data, tmp_path / "out", load_model=stateful / "model.pth", strategy="deepspeed_stage_3")
