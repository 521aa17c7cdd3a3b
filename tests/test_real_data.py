"""The main job on real input, through the scripts that users run: text to corpus, preferences to pairs, both into a run."""

import json
from pathlib import Path

import make_data
import prepare_pairs
import pytest
import torch
import train
from conftest import random_model
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
    line = next(message for message in caplog.messages if "mean |margin|" in message)
    assert float(line.split()[line.split().index("nats") - 1]) < 1e-3
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3
    assert records[0]["loss_dpo"] == pytest.approx(0.6931, abs=1e-3)
