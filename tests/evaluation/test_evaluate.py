"""evaluate.py, and the numbers in its report."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.config import RunConfig
from rwkv_dpo.data.pairs import load_pairs, pack_pairs, save_pairs
from rwkv_dpo.errors import InputError
from rwkv_dpo.evaluation.pairs import evaluate_pairs, margins_from_reference
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.model.tuning import begin_tuning
from rwkv_dpo.objective import score_pairs


def test_metrics_of_known_scores(tiny_shape):
    model = random_model(tiny_shape, torch.float32)
    rng = np.random.default_rng(0)
    pairs = pack_pairs([tuple(rng.integers(0, 61, n) for n in (3, 4, 5)) for _ in range(20)])
    logps = score_pairs(model, pairs, 1000)
    shifted = pairs.with_ref_logps(logps + np.where(np.arange(20)[:, None] < 15, [[-1.0, 1.0]], [[1.0, -1.0]]), "0" * 64, "fp32")
    got = evaluate_pairs(model, shifted, beta=0.5, batch_tokens=1000)
    assert got["rewards/accuracies"] == 0.75
    assert got["rewards/margins"] == pytest.approx(0.5)  # (15 * 1 - 5 * 1) / 20
    assert got["logps/accuracies"] == (logps[:, 0] > logps[:, 1]).mean()
    assert margins_from_reference(model, shifted, 4096).tolist() == pytest.approx([2.0] * 15 + [-2.0] * 5, abs=1e-4)


def test_metrics_by_hand_with_ties(monkeypatch):
    """A model of known log-probabilities: chosen is the more probable answer in two of four pairs, and has the larger reward in one."""
    logps = np.array([[-10.0, -20.0], [-1.0, -3.0], [-7.0, -7.0], [-8.0, -6.0]])
    refs = np.array([[-12.0, -15.0], [-1.0, -3.0], [-7.0, -9.0], [-4.0, -2.0]])
    monkeypatch.setattr("rwkv_dpo.evaluation.pairs.score_pairs", lambda model, pairs, batch_tokens, progress: logps)
    pairs = pack_pairs([([1], [2], [3])] * 4, refs)
    got = evaluate_pairs(None, pairs, beta=0.5, batch_tokens=1)
    assert (got["logps/accuracies"], got["rewards/accuracies"]) == (0.5, 0.25)
    # Margins of 7, 0, -2 and 0 nats.
    assert margins_from_reference(None, pairs, 1).tolist() == [7.0, 0.0, -2.0, 0.0]
    assert got["rewards/margins"] == pytest.approx(0.5 * (7 - 2) / 4)
    assert (got["logps/rejected"], got["ref_logps/chosen"]) == (-9.0, -6.0)


def test_the_report_compares_checkpoints(tmp_path, capsys):
    shape = ModelShape(1, 32, 32, 96, 65536, head_size=32)
    models = [random_model(shape, torch.float32, seed=i) for i in range(2)]
    for i, model in enumerate(models):
        save_weights(model.state_dict(), tmp_path / f"m{i}.pth")
    pairs = pack_pairs([([1, 2], [3, 4], [5]), ([7], [8], [9, 10])])
    save_pairs(tmp_path / "p.save", pairs.with_ref_logps(score_pairs(models[0], pairs, 99), "0" * 64, "fp32"))
    np.arange(70, dtype="<u2").tofile(tmp_path / "c.bin")
    arguments = [
        "--load_model",
        tmp_path / "m0.pth",
        tmp_path / "m1.pth",
        "--pairs",
        tmp_path / "p.save",
        "--data_file",
        tmp_path / "c.bin",
    ]
    more = [
        "--data_type",
        "uint16",
        "--ctx_len",
        30,
        "--prompt",
        "Why?",
        "--max_tokens",
        3,
        "--device",
        "cpu",
        "--out",
        tmp_path / "r.json",
    ]
    evaluate.main(list(map(str, arguments + more)))
    first, second = json.loads((tmp_path / "r.json").read_text())
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert second["corpus_loss"] != first["corpus_loss"]
    table = capsys.readouterr().out
    assert "m0.pth" in table
    assert f"{np.exp(first['corpus_loss']):.2f}" in table
    assert "answers:" in table


def test_adapters_and_states_get_a_column_each(tmp_path, capsys):
    shape = ModelShape(1, 32, 32, 96, 65536, head_size=32)
    pairs = pack_pairs([([1, 2], [3, 4], [5]), ([7], [8], [9, 10])])
    base = random_model(shape, torch.float32)
    save_weights(base.state_dict(), tmp_path / "base.pth")
    save_pairs(tmp_path / "p.save", pairs.with_ref_logps(score_pairs(base, pairs, 99), "0" * 64, "fp32"))
    want = []
    for method in ("lora", "state"):
        model = random_model(shape, torch.float32)
        tuning = begin_tuning(model, RunConfig(peft=method), frozenset())
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for p in trained.values():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        tuning.save(trained, tmp_path, "final")
        want.append(evaluate_pairs(model.eval(), load_pairs(tmp_path / "p.save", 65536), 0.1, 99))
    arguments = ["--peft_load", tmp_path / "adapter-final", tmp_path / "state-final.pth", "--device", "cpu", "--out", tmp_path / "r.json"]
    evaluate.main(list(map(str, ["--load_model", tmp_path / "base.pth", "--pairs", tmp_path / "p.save", *arguments])))
    reports = json.loads((tmp_path / "r.json").read_text())
    assert [Path(r["checkpoint"]).name for r in reports] == ["base.pth", "adapter-final", "state-final.pth"]
    assert reports[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    for report, metrics in zip(reports[1:], want, strict=True):
        assert report["rewards/margins"] == pytest.approx(metrics["rewards/margins"], abs=1e-4)
        assert abs(report["rewards/margins"]) > 1e-3
    assert "adapter-final" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--load_model", "none.pth"], r"none\.pth"),
    (["--load_modle", "x"], "--load_model"),
    (["--load_model", "x", "--precision", "int8"], "--precision"),
])  # fmt: skip
def test_faults_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate.main([*arguments, "--device", "cpu"])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("ctx_len", "0"), ("max_tokens", "-1"), ("temperature", "nan"), ("top_p", "1.5"), ("dpo_beta", "inf"), ("seed", "9" * 30)],
)
def test_a_number_that_makes_no_sense_is_refused_by_its_flag(flag, value):
    with pytest.raises(InputError, match=f"--{flag} "):
        evaluate.parse_flags(["--load_model", "m.pth", f"--{flag}", value])
