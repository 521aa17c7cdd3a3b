"""Training through the door that users use: train.py and its flags, on tiny models and CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import random_model
from runs import TINY, environment, flags
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import make_data, train
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.linear import Cast
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.run.model import build_model
from rwkv_dpo.run.settings import settings_of
from rwkv_dpo.training.module import DPOModule

TRAIN = Path(__file__).resolve().parents[2] / "RWKV-v5" / "train.py"


def run(data, proj_dir, **changes):
    train.main(flags(data, proj_dir, **changes))
    return [json.loads(line) for line in (proj_dir / "metrics.jsonl").read_text().splitlines()]


def final_weights(proj_dir):
    return torch.load(proj_dir / "rwkv-final.pth", weights_only=True)


class Finished(NamedTuple):
    records: list[dict]
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> Finished:
    """A run by the flags that all have, which others are held against."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    return Finished(run(data, folder), final_weights(folder))


def test_a_run_writes_the_folder_of_the_design(data, tmp_path):
    records = run(data, tmp_path, dpo_valid_file=data / "valid.save")
    assert [r["step"] for r in records] == list(range(1, 9))
    assert set(records[0]) == {
        "step", "epoch", "loss", "loss_general", "loss_dpo", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected", "ref_logps/chosen", "ref_logps/rejected", "grad_norm", "lr", "weight_decay", "tokens",
        "tokens_per_s", "pairs_seen", "skipped_steps", "peak_memory_gb",
    }  # fmt: skip
    for r in records:
        assert r["loss"] == pytest.approx(0.5 * r["loss_general"] + 0.5 * r["loss_dpo"], rel=1e-5)
    assert records[0]["loss_dpo"] == pytest.approx(np.log(2), abs=1e-4)  # the model is the reference
    assert records[-1]["lr"] == pytest.approx(1e-4)
    assert records[-1]["pairs_seen"] == 16
    assert records[-1]["rewards/margins"] > records[0]["rewards/margins"]
    names = {p.name for p in tmp_path.iterdir()}
    weights = {"rwkv-0.pth", "rwkv-1.pth", "rwkv-final.pth"}
    others = {"config.json", "metrics.jsonl", "train_log.txt", "valid.jsonl", "rwkv-final.json", "report.html", "curves.png"}
    assert names == others | weights | {f"{name}.sha256" for name in weights}
    assert (tmp_path / "rwkv-1.pth").samefile(tmp_path / "rwkv-final.pth")  # the same bytes once on the disk
    valid = [json.loads(line) for line in (tmp_path / "valid.jsonl").read_text().splitlines()]
    assert [v["epoch"] for v in valid] == [0, 1]
    assert valid[1]["loss_dpo"] < np.log(2)
    log_lines = (tmp_path / "train_log.txt").read_text().splitlines()
    assert log_lines[0].startswith("NEW RUN")
    assert [line.split()[0] for line in log_lines[-2:]] == ["0", "1"]
    saved, started = final_weights(tmp_path), torch.load(data / "model.pth", weights_only=True)
    assert saved.keys() == started.keys()
    assert all(saved[name].dtype == torch.float32 and saved[name].shape == started[name].shape for name in started)


def test_the_originals_pair_files_train_the_same(data, tmp_path, plain):
    b = run(data, tmp_path / "b", dpo_train_file=data / "original.save")
    assert [r["loss"] for r in plain.records] == pytest.approx([r["loss"] for r in b], rel=1e-6)


def test_accumulated_batches_equal_the_large_batch(data, tmp_path):
    """With an epsilon of Adam above the rounding of gradients: a gradient that is nothing but rounding, divided by its own size, would
    move a weight by up to the rate, in another direction in each run."""
    large = run(data, tmp_path / "large", micro_bsz=4, epoch_steps=2, adam_eps=1e-5)
    small = run(data, tmp_path / "small", micro_bsz=1, epoch_steps=8, accumulate_grad_batches=4, adam_eps=1e-5)
    assert len(large) == len(small) == 4
    for a, b in zip(large, small, strict=True):
        # Rewards are differences of fp32 log-probabilities near 30 (roundings of 2e-6) times a beta of 0.1.
        for name in ("loss", "loss_dpo", "rewards/margins", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=3e-6), name
        assert a["tokens"] == b["tokens"]
        assert a["lr"] == b["lr"]
    # Gradients of norm 1 and more are clipped to it and rounded to about 1e-9, which over the epsilon is a ten-thousandth of the rate of
    # 1e-3 in each of 4 steps.
    for name, weight in final_weights(tmp_path / "large").items():
        torch.testing.assert_close(final_weights(tmp_path / "small")[name], weight, rtol=1e-6, atol=2e-6)


def test_the_same_flags_give_the_same_bytes(data, tmp_path):
    for name in "ab":
        run(data, tmp_path / name, random_seed=3)
    assert (tmp_path / "a" / "rwkv-final.pth").read_bytes() == (tmp_path / "b" / "rwkv-final.pth").read_bytes()


CHANGES = [
    {"random_seed": 5}, {"ctx_len": 11}, {"dpo": 0}, {"dpo_beta": 0.7}, {"dpo_general_corpus_ratio": 0.9}, {"dropout": 0.2},
    {"epoch_steps": 5}, {"epoch_count": 1}, {"micro_bsz": 3}, {"accumulate_grad_batches": 2},
    {"lr_init": 2e-3}, {"lr_final": 5e-4}, {"warmup_steps": 3},
    {"beta1": 0.5}, {"beta2": 0.9}, {"adam_eps": 1e-2}, {"weight_decay": 0.5}, {"weight_decay": 0.5, "weight_decay_final": 0.1},
    {"layerwise_lr": 0}, {"magic_prime": 317}, {"magic_prime": 317, "my_pile_shift": 3}, {"my_pile_edecay": 1}, {"my_exit": 0},
    {"my_exit_tokens": 72}, {"my_exit_tokens": -72}, {"precision": "bf16"}, {"head_size_divisor": 4}, {"epoch_begin": 1},
    {"optim": "adamw_bf16state"}, {"optim": "adamw8bit"},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_every_flag_of_the_arithmetic_changes_the_result(data, tmp_path, plain, changes):
    records = run(data, tmp_path / "changed", **changes)
    changed = final_weights(tmp_path / "changed")
    assert any(not torch.equal(weight, changed[name]) for name, weight in plain.weights.items())
    assert all(np.isfinite(r["loss"]) for r in records)


@pytest.mark.parametrize("changes", [
    {"grad_cp": 1}, {"grad_cp": "selective"}, {"chunk_ctx": 16}, {"chunk_ctx": 17, "grad_cp": 1},
    {"wkv_backend": "reference"}, {"wkv_backend": "chunked"}, {"precision": "tf32"}, {"strategy": "ddp"},
], ids=str)  # fmt: skip
def test_flags_of_execution_change_nothing_but_rounding(data, tmp_path, plain, changes):
    records = run(data, tmp_path, **changes)
    assert [r["loss"] for r in plain.records] == pytest.approx([r["loss"] for r in records], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tbptt_cuts_gradients_between_chunks_and_leaves_values(data, tmp_path, precision):
    ways = {"exact": {"chunk_ctx": 16}, "truncated": {"chunk_ctx": 16, "tbptt": 1}}
    losses, weights = {}, {}
    for name, way in ways.items():
        losses[name] = [r["loss"] for r in run(data, tmp_path / name, ctx_len=40, precision=precision, epoch_count=1, **way)]
        weights[name] = final_weights(tmp_path / name)
    assert losses["truncated"][0] == pytest.approx(losses["exact"][0], rel=1e-6)
    assert losses["truncated"] == pytest.approx(losses["exact"], rel=0.05)
    assert any(not torch.allclose(weights["truncated"][name], weight, rtol=1e-4) for name, weight in weights["exact"].items())


def test_the_model_is_told_what_to_compute_again():
    for grad_cp in ("0", "1", "selective"):
        model = build_model(settings_of({"grad_cp": grad_cp, "wkv_backend": "reference"}), TINY, None, torch.device("cpu"))
        is_lean = grad_cp == "1"
        assert (model.is_lean, {one.keeps_cast for one in model.modules() if isinstance(one, Cast)}) == (is_lean, {not is_lean})


def test_fp16_scales_the_loss_and_learns(data, tmp_path):
    records = run(data, tmp_path, precision="fp16", epoch_steps=30, epoch_count=1)
    assert records[-1]["rewards/margins"] > 0.1
    assert records[-1]["grad_norm"] is not None
    assert final_weights(tmp_path)["head.weight"].dtype == torch.float32


def test_small_moments_learn_like_fp32_ones(data, tmp_path):
    """60 steps on pairs and corpus: the last steps' losses and margins within a few per cent of AdamW's."""
    lengths = {"epoch_steps": 60, "epoch_count": 1, "lr_init": 2e-3, "lr_final": 1e-3}
    records = {optim: run(data, tmp_path / optim, optim=optim, **lengths) for optim in ("adamw", "adamw_bf16state", "adamw8bit")}
    assert records["adamw"][-1]["loss_dpo"] < 0.8 * records["adamw"][0]["loss_dpo"]
    for name in ("loss", "loss_dpo", "rewards/margins"):
        last = {optim: np.mean([r[name] for r in of_optim[-10:]]) for optim, of_optim in records.items()}
        assert [last["adamw_bf16state"], last["adamw8bit"]] == pytest.approx([last["adamw"]] * 2, rel=0.03), name


def test_bf16_keeps_fp32_master_weights(data, tmp_path):
    # Steps of 1e-6 vanish when they are added to bf16 weights of order 0.1.
    run(data, tmp_path, precision="bf16", lr_init=1e-6, lr_final=1e-6)
    before, after = torch.load(data / "model.pth", weights_only=True), final_weights(tmp_path)
    moved = (after["head.weight"] - before["head.weight"]).abs()
    assert 0 < moved.max() < 2e-5


def test_ratio_0_needs_no_corpus_and_ratio_1_no_pairs(data, tmp_path):
    records = run(data, tmp_path / "pairs", dpo_general_corpus_ratio=0, data_file=None)
    assert "loss_general" not in records[0]
    records = run(data, tmp_path / "corpus", dpo_general_corpus_ratio=1, dpo_train_file="none.save")
    assert "loss_dpo" not in records[0]


def test_without_a_checkpoint_initial_weights_are_made_and_saved(data, tmp_path):
    run(data, tmp_path, load_model=None, dpo=0, vocab_size=61, n_layer=1, n_embd=32, head_size_a=16, epoch_count=1, epoch_steps=2)
    init = torch.load(tmp_path / "rwkv-init.pth", weights_only=True)
    assert init["blocks.0.att.time_decay"].shape == (2, 16)
    assert not init["blocks.0.att.output.weight"].any()


def test_text_trains_with_the_vocabulary_found_in_it(data, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
    run(
        data,
        tmp_path / "out",
        load_model=None,
        dpo=0,
        data_file=tmp_path / "text.txt",
        data_type="utf-8",
        n_layer=1,
        n_embd=32,
        head_size_a=32,
    )
    characters = sorted(set("to be or not to be, that is the question. "))
    assert final_weights(tmp_path / "out")["emb.weight"].shape[0] == len(characters)
    vocabulary = json.loads((tmp_path / "out" / "vocab.json").read_text(encoding="utf-16le"))
    assert vocabulary == {str(i): character for i, character in enumerate(characters)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model with the World's vocabulary, a text, its rows, and the corpus that make_data.py makes of it."""
    folder = tmp_path_factory.mktemp("world")
    save_weights(random_model(ModelShape(1, 32, 32, 96, 65536, head_size=32), torch.float32).state_dict(), folder / "World.pth")
    text = "To be or not to be, that is the question.\n" * 20
    (folder / "story.txt").write_text(text)
    (folder / "story.jsonl").write_text(json.dumps({"text": text}) + "\n")
    make_data.main([str(folder / "story.txt"), "1", "--out", str(folder / "made")])
    return folder


@pytest.mark.parametrize("changes", [{"dpo": 0}, {"dpo": 0, "data_type": "utf-8"}, {}], ids=["alone", "with its type", "beside pairs"])
def test_text_trains_a_world_model_as_its_tokens_do(data, world, tmp_path, changes):
    """--data_type utf-8, the default, once numbered the characters of the text for whatever model."""
    common = {"load_model": world / "World.pth", "data_type": None, "epoch_count": 1, **changes}
    losses = {}
    for name in ("made.bin", "story.txt", "story.jsonl"):
        settings = common | {"data_file": world / name} | ({"data_type": "binidx"} if name == "made.bin" else {})
        losses[name] = [r["loss"] for r in run(data, tmp_path / name, **settings)]
        assert not (tmp_path / name / "vocab.json").exists()
    assert losses["story.txt"] == losses["story.jsonl"] == losses["made.bin"]


def test_the_type_of_a_corpus_need_not_be_said_and_world_text_needs_no_checkpoint(data, world, tmp_path, caplog):
    fresh = {"load_model": None, "dpo": 0, "vocab_size": 65536, "n_layer": 1, "n_embd": 32, "head_size_a": 32, "data_type": None}
    with caplog.at_level("INFO"):
        a = run(data, tmp_path / "a", data_file=world / "made", epoch_count=1, **fresh)
        b = run(data, tmp_path / "b", data_file=world / "story.txt", epoch_count=1, **fresh)
    assert [r["loss"] for r in a] == [r["loss"] for r in b]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["data_type"] == "binidx"
    assert "tokens (1 document through the World tokenizer)" in caplog.text


def test_a_model_of_characters_goes_on_with_its_own_numbers(data, tmp_path):
    (tmp_path / "first.txt").write_text("the question is to be or not to be. " * 20)
    (tmp_path / "second.txt").write_text("no one is there. " * 20)
    sizes = {"dpo": 0, "n_layer": 1, "n_embd": 32, "head_size_a": 32, "data_type": None, "epoch_count": 1}
    run(data, tmp_path / "a", load_model=None, data_file=tmp_path / "first.txt", **sizes)
    run(data, tmp_path / "b", load_model=tmp_path / "a" / "rwkv-final.pth", data_file=tmp_path / "second.txt", **sizes)
    assert (tmp_path / "b" / "vocab.json").read_bytes() == (tmp_path / "a" / "vocab.json").read_bytes()
    (tmp_path / "a" / "vocab.json").unlink()
    with pytest.raises(InputError, match=r"second.txt: text for .*rwkv-final.pth, whose 13 tokens are not the World's"):
        run(data, tmp_path / "c", load_model=tmp_path / "a" / "rwkv-final.pth", data_file=tmp_path / "second.txt", **sizes)


def test_pairs_of_world_tokens_and_numbered_characters_are_not_mixed(data, tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be. " * 20)
    save_pairs(tmp_path / "world.save", pack_pairs([([1, 2], [3], [4])], np.zeros((1, 2)), {"tokenizer": "rwkv_vocab_v20230424"}))
    fresh = {"load_model": None, "data_type": None, "n_layer": 1, "n_embd": 32, "head_size_a": 32}
    with pytest.raises(InputError, match=r"world.save: its tokens are the World tokenizer's, and .*text.txt becomes numbers of its 8 char"):
        run(data, tmp_path / "out", data_file=tmp_path / "text.txt", dpo_train_file=tmp_path / "world.save", **fresh)


def test_staged_pretraining_starts_stops_and_continues_from_the_newest_checkpoint(data, tmp_path):
    # An epoch of staged training is 40,320 windows: here 2 steps of 20,160 windows of 2 tokens.
    np.random.default_rng(0).integers(0, 61, 2 * 81000 + 1).astype("<u2").tofile(tmp_path / "corpus.bin")
    stage = {
        "dpo": 0, "data_file": tmp_path / "corpus.bin", "load_model": 0, "vocab_size": 61, "n_layer": 1, "n_embd": 32, "head_size_a": 32,
        "ctx_len": 2, "micro_bsz": 20160, "magic_prime": 80963, "epoch_count": 999,
    }  # fmt: skip
    out = tmp_path / "out"
    train.main(flags(data, out, **stage, my_pile_stage=1))
    assert sorted(p.name for p in out.glob("*.pth")) == ["rwkv-init.pth"]
    records = run(data, out, **stage, my_pile_stage=3)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[-1]["lr"] == pytest.approx(1e-4)
    assert sorted(p.name for p in out.glob("*.pth")) == ["rwkv-0.pth", "rwkv-1.pth", "rwkv-final.pth", "rwkv-init.pth"]
    whole = final_weights(out)

    for name in ("rwkv-1.pth", "rwkv-final.pth"):  # as if the run had died in its second epoch
        (out / name).unlink()
    records = run(data, out, **stage, my_pile_stage=3, warmup_steps=0)
    assert [r["step"] for r in records][-2:] == [3, 4]
    assert records[-1]["lr"] == pytest.approx(1e-4)
    # Adam starts afresh, so the weights differ a little, but the second epoch saw the same windows.
    assert (final_weights(out)["head.weight"] - whole["head.weight"]).abs().max() < 0.01


def test_a_dry_run_reports_and_leaves_nothing_behind(data, tmp_path, capsys):
    train.main(flags(data, tmp_path / "out", dry_run=1))
    report = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    n = sum(w.numel() for w in torch.load(data / "model.pth", weights_only=True).values())
    assert f"{n:,} parameters, {n:,} of them trained" in report
    pairs = load_pairs(data / "train.save")
    sizes = sorted(sum(part.size for part in pairs.pair(i)) - 2 for i in range(10))
    assert f"2 x 12 tokens of corpus and the 2 longest of 10 pairs; {24 + sum(sizes[-2:])} tokens" in report
    assert "--grad_cp 1 " in report
    with pytest.raises(InputError, match="--vocab_size is needed for --dry_run 1"):
        train.main(flags(data, tmp_path / "out", dry_run=1, load_model=None))


def test_a_dry_run_needs_no_gpu_and_no_files(data, tmp_path, capsys, caplog):
    """A model of 7 billion parameters, for a GPU, from its flags."""
    sizes = {"n_layer": 32, "n_embd": 4096, "vocab_size": 65536, "head_size_a": 64, "ctx_len": 4096, "micro_bsz": 1}
    train.main(flags(data, tmp_path, dry_run=1, load_model=None, accelerator="gpu", wkv_backend=None, dpo_train_file="none.save", **sizes))
    assert "7,518,044,160 parameters" in capsys.readouterr().out
    assert "none.save does not exist" in caplog.text


README_COMMAND = (
    "--load_model ./RWKV-5-World-0.4B-v2-20231113-ctx4096.pth --proj_dir ./models_2 --ctx_len 4096 --epoch_count 4 --epoch_begin 0 "
    "--epoch_steps 2000 --data_file ./RWKV-LM/RWKV-v5/data/minipile --data_type binidx --vocab_size 65536 --epoch_save 1 --micro_bsz 1 "
    "--n_layer 24 --n_embd 1024 --pre_ffn 0 --head_qk 0 --lr_init 5e-6 --lr_final 1e-6 --warmup_steps 50 --beta1 0.9 --beta2 0.99 "
    "--adam_eps 1e-8 --accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 0 "
    "--accumulate_grad_batches 20 --enable_progress_bar True --ds_bucket_mb 200 --my_testing r3r4 --dpo 1 "
    "--dpo_train_file ./trainset.save --dpo_general_corpus_ratio 0.8 --dpo_beta 0.02 --wandb PROJECT --dry_run 1"
)


def test_a_dry_run_needs_no_checkpoint_whose_shape_the_flags_say(tmp_path, monkeypatch, capsys, caplog):
    """README's command with no file of it there, and nothing that a GPU needs."""
    monkeypatch.chdir(tmp_path)
    train.main(README_COMMAND.split())
    assert "461,721,600 parameters" in capsys.readouterr().out
    assert "--load_model ./RWKV-5-World-0.4B-v2-20231113-ctx4096.pth does not exist: its shape is taken from the flags" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_without_its_checkpoint_asks_for_the_flags_that_say_its_shape(data, tmp_path):
    with pytest.raises(InputError, match=r"none.pth: no such file; --dry_run 1 can do without .*: --n_embd, --vocab_size$"):
        train.main(flags(data, tmp_path, dry_run=1, load_model="none.pth", n_layer=24))


@pytest.mark.parametrize("changes", [{"peft": "state"}, {"peft": "lora", "peft_load": "nowhere/adapter-final"}], ids=str)
def test_a_dry_run_of_an_adapter_needs_neither_checkpoint_nor_adapter(data, tmp_path, capsys, changes):
    sizes = {"load_model": "none.pth", "n_layer": 24, "n_embd": 1024, "vocab_size": 65536, "head_size_a": 64}
    train.main(flags(data, tmp_path, dry_run=1, **sizes, **changes))
    # 16 heads of 64 x 64; r = 32 for five projections of the time mix (two sides of 1,024) and three of the channel mix.
    n = 24 * 16 * 64 * 64 if changes["peft"] == "state" else 24 * 32 * (5 * 2048 + 2 * 4608 + 2048)
    assert f"{n:,} of them trained" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [
    {"micro_bsz": 3}, {"ctx_len": 3000}, {"precision": "bf16"}, {"grad_cp": 1}, {"optim": "adamw_bf16state"}, {"cpu_malloc": 1},
    {"dpo": 0}, {"wkv_backend": "reference"}, {"accumulate_grad_batches": 4}, {"strategy": "deepspeed_stage_2"},
], ids=str)  # fmt: skip
def test_what_a_dry_run_says_depends_on_the_flags(data, tmp_path, capsys, changes):
    reports = []
    sizes = {"load_model": None, "n_layer": 24, "n_embd": 1024, "vocab_size": 65536, "head_size_a": 64, "ctx_len": 4096}
    for settings in (sizes, sizes | changes):
        train.main(flags(data, tmp_path, dry_run=1, **settings))
        reports.append(capsys.readouterr().out.split("with one flag changed")[0])
    assert reports[0] != reports[1]


def test_gradients_are_gone_before_the_next_forward_pass_unless_they_accumulate(data, tmp_path, monkeypatch):
    counts, step = [], DPOModule.training_step

    def counting(module, batch, batch_idx):
        counts.append(sum(p.grad is not None for p in module.parameters()))
        return step(module, batch, batch_idx)

    monkeypatch.setattr(DPOModule, "training_step", counting)
    run(data, tmp_path, accumulate_grad_batches=2, epoch_count=1)
    n = len(final_weights(tmp_path))
    assert counts == [0, n, 0, n]


def test_a_warm_up_longer_than_the_run_is_told_of(data, tmp_path, caplog):
    run(data, tmp_path / "long", warmup_steps=20)
    assert "the last of 8 optimizer steps has a learning rate of 0.00048 instead of --lr_final 0.0001 (--warmup_steps 20" in caplog.text
    caplog.clear()
    run(data, tmp_path / "short", warmup_steps=3)
    assert "--lr_final" not in caplog.text


def test_a_folder_of_another_run_is_refused_unless_overwritten(data, tmp_path):
    run(data, tmp_path)
    with pytest.raises(InputError, match=r"other settings: --dpo_beta 0.3 \(was 0.1\)"):
        run(data, tmp_path, dpo_beta=0.3)
    with pytest.raises(InputError, match=r"other settings: --load_model .*rwkv-final.pth \(was .*model.pth\)"):
        run(data, tmp_path, load_model=tmp_path / "rwkv-final.pth")
    run(data, tmp_path, resume="none")  # the same run again: what it wrote before is set aside
    assert (tmp_path / "earlier-1" / "metrics.jsonl").exists()
    assert len(run(data, tmp_path, dpo_beta=0.3, overwrite=1)) == 8


def test_a_checkpoint_that_is_not_the_reference_is_reported(data, tmp_path, caplog):
    other = random_model(TINY, torch.float32, seed=1)
    save_weights(other.state_dict(), tmp_path / "other.pth")
    with caplog.at_level("INFO"):
        run(data, tmp_path / "out", load_model=tmp_path / "other.pth")
    assert "not the one that scored dpo_train_file" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        run(data, tmp_path / "out2")
    assert "mean |margin|" in caplog.text
    assert "not the one" not in caplog.text


def test_the_original_command_runs_as_a_program_from_another_directory(data, tmp_path):
    """The original's README command, its names and order kept; sizes are tiny and the accelerator is a CPU."""
    binidx = tmp_path / "minipile"
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} of a small corpus about nothing." for i in range(50)))
    make_data.main([str(tmp_path / "text.txt"), "1", "--out", str(binidx)])
    shape = ModelShape(2, 64, 64, 224, 65536, head_size=64)
    model = random_model(shape, torch.float32)
    save_weights({n: w.bfloat16() for n, w in model.state_dict().items()}, tmp_path / "base.pth")
    command = [
        str(TRAIN), "--load_model", "./base.pth", "--wandb", "a project", "--proj_dir", "./models_2", "--ctx_len", "32",
        "--epoch_count", "2",
        "--epoch_begin", "0", "--epoch_steps", "4", "--data_file", "./minipile", "--data_type", "binidx", "--vocab_size", "65536",
        "--epoch_save", "1", "--micro_bsz", "1", "--n_layer", "2", "--n_embd", "64", "--pre_ffn", "0", "--head_qk", "0",
        "--lr_init", "5e-6", "--lr_final", "1e-6", "--warmup_steps", "50",
        "--beta1", "0.9", "--beta2", "0.99", "--adam_eps", "1e-8", "--accelerator", "cpu",
        "--devices", "1", "--precision", "bf16", "--strategy", "deepspeed_stage_2", "--grad_cp", "0", "--accumulate_grad_batches", "2",
        "--enable_progress_bar", "True", "--ds_bucket_mb", "200", "--my_testing", "r3r4", "--dpo", "1", "--dpo_train_file",
        str(data / "train.save"), "--dpo_general_corpus_ratio", "0.8", "--dpo_beta", "0.02",
    ]  # fmt: skip
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = environment(PATH=path, WANDB_MODE="offline", WANDB_SILENT="true")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "models_2" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[0]["lr"] == pytest.approx(1e-6)  # a fifth of 5e-6, at the start of the warm-up
    assert all(r["grad_norm"] > 0 for r in records)
    assert torch.load(tmp_path / "models_2" / "rwkv-final.pth", weights_only=True)["head.weight"].dtype == torch.float32
    assert list((tmp_path / "models_2" / "wandb").glob("offline-run-*"))


BAD = [
    ({"load_model": "none.pth"}, r"none.pth: no such checkpoint"),
    ({"n_layer": 3}, r"--n_layer 3 \(the file has 2\)"),
    ({"n_embd": 64}, r"--n_embd 64 \(the file has 32\)"),
    ({"vocab_size": 62}, r"--vocab_size 62 \(the file has 61\)"),
    ({"head_size_a": 16}, r"--head_size_a 16 \(the file has 8\)"),
    ({"head_size_a": 12}, "--head_size_a 12: multiples of 8"),
    ({"ctx_len": 4000}, r"corpus.bin: 4000 tokens, fewer than one window of --ctx_len 4000"),
    ({"data_file": "none"}, "none"),
    ({"data_file": None}, "--data_file is needed"),
    ({"data_type": "parquet"}, "--data_type 'parquet': accepted are"),
    ({"data_type": "binidx", "data_file": "nowhere"}, r"nowhere\.idx"),
    ({"dpo_train_file": "none.save"}, r"none\.save"),
    ({"dpo_general_corpus_ratio": 1.5}, "--dpo_general_corpus_ratio 1.5: 0 to 1"),
    ({"dpo_beta": 0}, "--dpo_beta 0.0: more than 0"),
    ({"micro_bsz": 0}, "--micro_bsz 0: at least 1"),
    ({"epoch_steps": 5, "accumulate_grad_batches": 2}, "--epoch_steps 5 is not a multiple of --accumulate_grad_batches 2: .* 4 is"),
    ({"precision": "int8"}, "--precision 'int8': accepted are"),
    ({"accelerator": "tpu"}, "--accelerator 'tpu': accepted are"),
    ({"wkv_backend": "cuda"}, "--wkv_backend cuda can't be used on cpu"),
    ({"strategy": "fsdp"}, "--strategy 'fsdp'"),
    ({"my_testing": "x061"}, "--my_testing x061: that model version isn't supported"),
    ({"my_testing": "x060"}, r"--my_testing 6 \(the file has 5\)"),
    ({"pre_ffn": 1}, "--pre_ffn 1: that experiment"),
    ({"tiny_att_dim": 256}, "--tiny_att_dim 256"),
    ({"magic_prime": 100}, "--magic_prime 100"),
    # 333 windows of 12 tokens fit into 4,000; the last of 317 ends at token 3,804.
    ({"magic_prime": 317, "my_pile_shift": 196}, "--my_pile_shift 196: moves the last window past .* up to 195 is accepted"),
    ({"my_exit": -1}, "--my_exit -1: nothing would be trained"),
    ({"my_pile_stage": 2, "magic_prime": 317}, "rwkv-"),
    ({"my_pile_stage": 1, "magic_prime": 317}, "--my_pile_stage 1 makes initial weights"),
    ({"grad_cp": 2}, "--grad_cp '2': accepted are '0', '1', 'selective'"),
    ({"chunk_ctx": 15}, r"--chunk_ctx 15: 0 \(off\), and 16 or more"),
    ({"chunk_ctx": -1}, r"--chunk_ctx -1: 0 \(off\), and 16 or more"),
    ({"tbptt": 1}, "--tbptt 1 cuts gradients between chunks: it needs --chunk_ctx"),
    ({"tbptt": 2, "chunk_ctx": 16}, "--tbptt 2: 0 and 1"),
    ({"chunk_ctx": 16, "strategy": "deepspeed_stage_3"}, "--chunk_ctx 16: not with --strategy deepspeed_stage_3"),
    ({"optim": "sgd"}, "--optim 'sgd': accepted are 'adamw', 'adamw8bit', 'adamw_bf16state'"),
    ({"optim": "adamw8bit", "strategy": "deepspeed_stage_2_offload"}, "--strategy deepspeed_stage_2_offload takes adamw"),
    ({"dry_run": 2}, "--dry_run 2: 0 and 1"),
    ({"lr_init": "fast"}, "--lr_init: invalid float value: 'fast'"),
    ({"dpo_betta": 1}, r"--dpo_betta: unknown flag; did you mean --dpo_beta\?"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_bad_input_is_refused_in_one_line_before_anything_is_written(data, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        run(data, tmp_path / "out", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_named_and_missing_is_refused_and_auto_takes_the_cpu(data, tmp_path):
    with pytest.raises(InputError, match="--accelerator gpu: no usable NVIDIA GPU"):
        run(data, tmp_path / "out", accelerator="gpu")
    assert run(data, tmp_path / "out", accelerator="auto", epoch_count=1)


def test_tokens_outside_the_vocabulary_are_refused_with_their_place(data, tmp_path):
    tokens = np.fromfile(data / "corpus.bin", "<u2")
    tokens[1234] = 61
    tokens.tofile(tmp_path / "bad.bin")
    with pytest.raises(InputError, match=r"bad.bin.*61.*1234|bad.bin.*1234.*61"):
        run(data, tmp_path / "out", data_file=tmp_path / "bad.bin")
    pairs = pack_pairs([([1, 2], [3], [4]), ([1], [61], [2])], np.zeros((2, 2)))
    save_pairs(tmp_path / "bad.save", pairs)
    with pytest.raises(InputError, match=r"bad.save.*vocabulary"):
        run(data, tmp_path / "out", dpo_train_file=tmp_path / "bad.save")


def test_pairs_without_reference_scores_are_refused(data, tmp_path):
    save_pairs(tmp_path / "unscored.save", pack_pairs([([1, 2], [3], [4])]))
    with pytest.raises(InputError, match=r"unscored.save: its pairs have no reference log-probabilities"):
        run(data, tmp_path / "out", dpo_train_file=tmp_path / "unscored.save")


def test_a_folder_that_cannot_be_made_is_refused(data):
    with pytest.raises(InputError, match="--proj_dir /proc/out: can't be created"):
        run(data, Path("/proc/out"))


def test_a_proj_dir_that_is_a_file_is_refused(data, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match=r"--proj_dir .*out: can't be created"):
        run(data, tmp_path / "out")


def test_the_program_exits_with_2_and_one_line(tmp_path):
    done = subprocess.run([sys.executable, str(TRAIN), "--no_such_flag", "1"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: --no_such_flag: unknown flag")
    assert len(done.stderr.splitlines()) == 1
