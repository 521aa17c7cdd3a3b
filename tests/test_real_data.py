"""The main job on real input, through the scripts that users run: text to corpus, preferences to pairs, both into a run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import random_model
from rwkv_dpo.commands import evaluate, make_data, prepare_pairs, train
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data is not beside the checkout")
@pytest.mark.parametrize(("preferences", "text"), [("dpo_en_demo.json", "wiki_demo.txt"), ("dpo_zh_demo.json", "c4_demo.jsonl")])
def test_real_preferences_and_text_become_a_run_that_starts_at_the_reference(tmp_path, caplog, preferences, text):
    model = random_model(ModelShape(1, 32, 32, 96, 65536, head_size=32), torch.float32)
    save_weights(model.state_dict(), tmp_path / "base.pth")
    make_data.main([str(DATA / text), "1", "64", "--out", str(tmp_path / "text")])
    pairs = ["--source", DATA / preferences, "--load_model", tmp_path / "base.pth", "--out_dir", tmp_path, "--limit", 40, "--ctx_len", 200]
    prepare_pairs.main(list(map(str, [*pairs, "--device", "cpu"])))
    run = {
        "load_model": tmp_path / "base.pth", "proj_dir": tmp_path / "out", "data_file": tmp_path / "text", "data_type": "binidx",
        "ctx_len": 64,
        "dpo_train_file": tmp_path / "trainset.save", "dpo_general_corpus_ratio": 0.5, "accelerator": "cpu", "precision": "fp32",
        "micro_bsz": 2, "epoch_steps": 3, "epoch_count": 1, "enable_progress_bar": False, "cpu_malloc": 0,
    }  # fmt: skip
    with caplog.at_level("INFO"):
        train.main([part for name, value in run.items() for part in (f"--{name}", str(value))])
    begins_at_the_reference(caplog, tmp_path / "out")


def begins_at_the_reference(caplog, proj_dir):
    line = next(message for message in caplog.messages if "mean |margin|" in message)
    assert float(line.split()[line.split().index("nats") - 1]) < 1e-3
    records = [json.loads(line) for line in (proj_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    assert records[0]["loss_dpo"] == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data is not beside the checkout")
def test_real_preferences_in_files_of_torch_save_train_and_compare_as_in_ours(tmp_path, caplog):
    """The same pairs as prepare_pairs.py writes them in both forms, and as the original's notebook would save them: with tensors."""
    model = random_model(ModelShape(1, 32, 32, 96, 65536, head_size=32), torch.float32)
    save_weights(model.state_dict(), tmp_path / "base.pth")
    common = ["--source", DATA / "dpo_en_demo.json", "--load_model", tmp_path / "base.pth", "--limit", 40, "--ctx_len", 200]
    common += ["--device", "cpu"]
    folders = [tmp_path / name for name in ("packed", "original", "zip", "legacy")]
    for folder, is_original in zip(folders[:2], (0, 1), strict=True):
        prepare_pairs.main(list(map(str, [*common, "--out_dir", folder, "--original_format", is_original])))
    for name in ("trainset.save", "validset.save", "testset.save"):
        rows = torch.load(folders[1] / name, weights_only=True)
        # A log-probability as the rwkv package's pipeline leaves it: a tensor of no dimension.
        rows = [(prompt, torch.tensor(chosen), rejected, torch.tensor(a), torch.tensor(b)) for prompt, chosen, rejected, a, b in rows]
        for folder in folders[2:]:
            folder.mkdir(exist_ok=True)
            torch.save(rows, folder / name, _use_new_zipfile_serialization=folder.name == "zip")
    reports = []
    for folder in folders:
        run = {
            "load_model": tmp_path / "base.pth", "proj_dir": folder / "out", "ctx_len": 200, "dpo_train_file": folder / "trainset.save",
            "dpo_valid_file": folder / "validset.save", "accelerator": "cpu", "precision": "fp32", "micro_bsz": 2, "epoch_steps": 3,
            "epoch_count": 1, "lr_init": 1e-3, "enable_progress_bar": False, "cpu_malloc": 0,
        }  # fmt: skip
        caplog.clear()
        with caplog.at_level("INFO"):
            train.main([part for name, value in run.items() for part in (f"--{name}", str(value))])
        begins_at_the_reference(caplog, folder / "out")
        files = ["--load_model", tmp_path / "base.pth", folder / "out" / "rwkv-final.pth", "--pairs", folder / "testset.save"]
        evaluate.main(list(map(str, [*files, "--device", "cpu", "--out", folder / "report.json"])))
        reports.append(json.loads((folder / "report.json").read_text()))
    for report in reports:
        assert report[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
        # Scores of the last two are fp32, which at -2,000 nats is to 1e-4; beta is 0.01.
        assert report[1]["rewards/margins"] == pytest.approx(reports[0][1]["rewards/margins"], abs=1e-5)
