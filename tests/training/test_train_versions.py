"""Runs of RWKV-6 and RWKV-7 by train.py and the other scripts: what knows a version by itself, from files, from flags."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import random_model
from runs import RANKS, TINY, flags, write_inputs
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import evaluate, export, train
from rwkv_dpo.model.checkpoint import load_model, read_weights, shape_of


@pytest.fixture(scope="module", params=["6", "7"])
def version(request):
    return request.param


@pytest.fixture(scope="module")
def files(version, tmp_path_factory):
    """The files of runs.write_inputs."""
    folder = tmp_path_factory.mktemp(f"data{version}")
    write_inputs(folder, replace(TINY, version=version, ranks=RANKS[version]), 10)
    return folder


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, {"chunk_ctx": 16, "grad_cp": 1}, {"grad_cp": "selective", "dpo_ref": "recompute"}], ids=str)
def test_a_run_takes_the_version_from_its_checkpoint_and_writes_it(version, files, tmp_path, changes):
    train.main(flags(files, tmp_path, **changes))
    weights = read_weights(tmp_path / "rwkv-final.pth")
    assert shape_of(weights, "final") == replace(TINY, version=version, ranks=RANKS[version])
    before = read_weights(files / "model.pth")
    assert all(not torch.equal(w, before[name]) for name, w in weights.items() if not name.endswith("time_faaaa"))
    if not changes:
        assert losses(tmp_path)[0] == pytest.approx(losses_of_another_backend(files, tmp_path / "chunked")[0], rel=1e-5)


def losses_of_another_backend(files, folder):
    train.main(flags(files, folder, wkv_backend="chunked", epoch_count=1, epoch_steps=1))
    return losses(folder)


@pytest.mark.parametrize("name", ["x060", "x070"])
def test_flags_that_contradict_the_version_are_refused(version, files, tmp_path, name):
    if name == {"6": "x060", "7": "x070"}[version]:
        train.main(flags(files, tmp_path, my_testing=name, dry_run=1))
    else:
        with pytest.raises(InputError, match=rf"--my_testing {name[2]} \(the file has {version}\)"):
            train.main(flags(files, tmp_path, my_testing=name))


@pytest.mark.parametrize("changes", [{"peft": "lora"}, {"peft": "dora", "train_extra": "lowrank,time"}, {"peft": "pissa"}], ids=str)
def test_adapters_train_and_are_merged(version, files, tmp_path, changes):
    train.main(flags(files, tmp_path / "run", lora_r=4, lora_alpha=8, **changes))
    adapter = tmp_path / "run" / "adapter-final"
    names = set(json.loads((adapter / "adapter_config.json").read_text())["target_modules"])
    halves = {"6": 8, "7": 6}[version]
    assert len(names) == 2 * halves
    export.main(["--load_model", str(files / "model.pth"), "--peft_load", str(adapter), "--out", str(tmp_path / "merged.pth")])
    merged = load_model(tmp_path / "merged.pth", device=torch.device("cpu"), compute_dtype=torch.float32)
    before = read_weights(files / "model.pth")
    changed = {name for name, w in merged.state_dict().items() if not torch.equal(w, before[name])}
    small = {"6": "blocks.1.att.time_decay_w2", "7": "blocks.1.att.g2"}[version]
    assert (small in changed) == ("train_extra" in changes)
    assert "blocks.1.ffn.value.weight" in changed


def test_states_are_tuned(version, files, tmp_path):
    train.main(flags(files, tmp_path, peft="state"))
    state = torch.load(tmp_path / "state-final.pth", weights_only=True)
    assert {name: tuple(x.shape) for name, x in state.items()} == {f"blocks.{i}.att.time_state": (4, 8, 8) for i in range(2)}
    assert all(x.any() for x in state.values())


@pytest.mark.parametrize("spelling", ["RWKV-LM", "others"])
def test_rwkv_lms_two_stages_make_and_train_a_new_model(version, files, tmp_path, spelling):
    """Its demo-training-prepare.sh and demo-training-run.sh, at the size of a test."""
    named = ["--my_testing", f"x0{version}0"] if spelling == "RWKV-LM" else ["--rwkv_version", version]
    shared = [
        "--wandb", "", "--proj_dir", str(tmp_path), "--data_file", str(files / "corpus.bin"), "--data_type", "uint16",
        "--vocab_size", "61", *named, "--ctx_len", "12", "--epoch_begin", "0", "--head_size", "8", "--num_nodes", "1", "--n_layer", "2",
        "--n_embd", "32", "--magic_prime", "317", "--lr_init", "6e-4", "--lr_final", "6e-5", "--beta1", "0.9", "--beta2", "0.99",
        "--adam_eps", "1e-18", "--accelerator", "cpu", "--devices", "1", "--precision", "bf16", "--weight_decay", "0.001",
        "--cpu_malloc", "0", "--enable_progress_bar", "True", "--ds_bucket_mb", "200", "--dpo", "0",
    ]  # fmt: skip
    train.main([*shared, "--train_stage", "1", "--epoch_count", "1", "--epoch_save", "1", "--micro_bsz", "1", "--grad_cp", "1"])
    weights = read_weights(tmp_path / "rwkv-init.pth")
    dim_ffn = 128 if version == "7" else 96
    ranks = {"6": (160, 64), "7": (32, 32, 32, 32)}[version]
    assert shape_of(weights, "init") == replace(TINY, version=version, dim_ffn=dim_ffn, ranks=ranks)
    train.main([*shared, "--load_model", "0", "--epoch_count", "1", "--epoch_steps", "3", "--micro_bsz", "4",
                "--epoch_save", "0", "--kernel", "fla", "--overwrite", "1", "--grad_cp", "1", "--warmup_steps", "1"])  # fmt: skip
    assert shape_of(read_weights(tmp_path / "rwkv-final.pth"), "final").version == version


def test_a_dry_run_counts_what_a_version_has(version, files, tmp_path, capsys):
    train.main(flags(files, tmp_path, dry_run=1))
    n = sum(w.numel() for w in read_weights(files / "model.pth").values())
    report = capsys.readouterr().out
    assert f"RWKV-{version} L2 D32" in report
    assert f"{n:,} parameters, {n:,} of them trained" in report


def test_evaluation_runs(version, tmp_path):
    model = random_model(replace(TINY, version=version, vocab_size=65536), torch.float32)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    common = ["--load_model", str(tmp_path / "m.pth")]
    evaluate.main([*common, "--prompt", "Hello", "--max_tokens", "3", "--device", "cpu", "--out", str(tmp_path / "r.json")])
    assert json.loads((tmp_path / "r.json").read_text())
