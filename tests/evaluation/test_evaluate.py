"""evaluate.py, and the numbers in its report."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import evaluate
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.data.pairs import content_sha256, pack_pairs
from rwkv_dpo.evaluation.scoring import evaluate_pairs, score_pairs
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.tuning.settings import TuningSettings
from rwkv_dpo.tuning.tuning import begin_tuning


def test_metrics_of_known_scores(tiny_shape):
    model = random_model(tiny_shape, torch.float32)
    rng = np.random.default_rng(0)
    pairs = pack_pairs([tuple(rng.integers(0, 61, n) for n in (3, 4, 5)) for _ in range(20)])
    logps = score_pairs(model, pairs, 1000)
    shifted = pairs.with_ref_logps(logps + np.where(np.arange(20)[:, None] < 15, [[-1.0, 1.0]], [[1.0, -1.0]]), "0" * 64, "fp32")
    got = evaluate_pairs(model, shifted, dpo(0.5), batch_tokens=1000)
    assert got["rewards/accuracies"] == 0.75
    assert got["rewards/margins"] == pytest.approx(0.5)  # (15 * 1 - 5 * 1) / 20
    assert got["logps/accuracies"] == (logps[:, 0] > logps[:, 1]).mean()


def test_metrics_by_hand_with_ties(monkeypatch):
    """A model of known log-probabilities: chosen is the more probable answer in two of four pairs, and has the larger reward in one."""
    logps = np.array([[-10.0, -20.0], [-1.0, -3.0], [-7.0, -7.0], [-8.0, -6.0]])
    refs = np.array([[-12.0, -15.0], [-1.0, -3.0], [-7.0, -9.0], [-4.0, -2.0]])
    monkeypatch.setattr("rwkv_dpo.evaluation.scoring.score_pairs", lambda *given: logps)
    pairs = pack_pairs([([1], [2], [3])] * 4, refs)
    got = evaluate_pairs(None, pairs, dpo(0.5), batch_tokens=1)
    assert (got["logps/accuracies"], got["rewards/accuracies"]) == (0.5, 0.25)
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
        tuning = begin_tuning(model, TuningSettings(peft=method), frozenset())
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for p in trained.values():
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        tuning.save(trained, tmp_path, "final")
        want.append(evaluate_pairs(model.eval(), load_pairs(tmp_path / "p.save", 65536), dpo(0.1), 99))
    arguments = ["--peft_load", tmp_path / "adapter-final", tmp_path / "state-final.pth", "--device", "cpu", "--out", tmp_path / "r.json"]
    arguments += ["--pairs", tmp_path / "p.save", "--dpo_beta", 0.1]
    evaluate.main(list(map(str, ["--load_model", tmp_path / "base.pth", *arguments])))
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


@pytest.fixture
def two_models(tmp_path):
    """base.pth; a run folder whose model is another one; pairs.save that the first one scored, and unscored.save."""
    shape = ModelShape(1, 32, 32, 96, 65536, head_size=32)
    (tmp_path / "out").mkdir()
    models = [random_model(shape, torch.float32, seed=seed) for seed in range(2)]
    for model, name in zip(models, ("base.pth", "out/rwkv-final.pth"), strict=True):
        save_weights(model.state_dict(), tmp_path / name)
    unscored = pack_pairs([([1, 2], [3, 4], [5]), ([7], [8], [9, 10]), ([11], [12], [13])])
    save_pairs(tmp_path / "unscored.save", unscored)
    save_pairs(tmp_path / "pairs.save", unscored.with_ref_logps(score_pairs(models[0], unscored, 99), "0" * 64, "fp32"))
    return tmp_path


def report_of(folder, *flags):
    evaluate.main(["--device", "cpu", "--out", str(folder / "r.json"), *map(str, flags)])
    # Refuses what only Python reads.
    return json.loads((folder / "r.json").read_text(), parse_constant=pytest.fail)


def save_run(folder, **settings):
    content = {"dpo_train_file": settings.pop("sha256", ""), "source_id": "s", "preparation_id": "a" * 64}
    config = {"dpo": 1, "dpo_beta": 0.25, "dpo_train_file": str(folder / "pairs.save"), "dpo_ref": "file", "content": content, **settings}
    (folder / "out" / "config.json").write_text(json.dumps(config))


def test_rewards_take_the_beta_of_the_run_and_the_report_says_which(two_models, capsys):
    base, tuned = two_models / "base.pth", two_models / "out" / "rwkv-final.pth"
    common = ("--pairs", two_models / "pairs.save", "--load_model", base, tuned)
    without = report_of(two_models, *common)
    assert [column["dpo_beta"] for column in without] == [0.01, 0.01]  # train.py's default
    save_run(two_models)
    own = report_of(two_models, *common)
    assert [column["dpo_beta"] for column in own] == [0.25, 0.25]
    assert own[1]["rewards/margins"] == pytest.approx(25 * without[1]["rewards/margins"])
    assert "beta of the rewards" in capsys.readouterr().out
    assert [column["dpo_beta"] for column in report_of(two_models, *common, "--dpo_beta", 0.5)] == [0.5, 0.5]
    for foreign in ('{"dpo": 1, "dpo_beta": "x", "dpo_train_file": "y"}', "[]", "{", '{"hidden_size": 32}'):
        (two_models / "out" / "config.json").write_text(foreign)
        assert report_of(two_models, *common)[1]["dpo_beta"] == 0.01


def test_pairs_that_are_not_scored_get_what_needs_no_reference(two_models, capsys):
    (report,) = report_of(two_models, "--load_model", two_models / "base.pth", "--pairs", two_models / "unscored.save")
    assert set(report) == {"checkpoint", "logps/chosen", "logps/rejected", "logps/accuracies", "logps/margins",
                           "lengths/chosen", "lengths/rejected", "lengths/preferred", "pairs"}  # fmt: skip
    told = capsys.readouterr()
    assert told.err.startswith(f"warning: --pairs {two_models / 'unscored.save'}: not scored by a reference, so that rewards are left out")
    assert "preference accuracy" in told.out
    assert "reward" not in told.out


def test_no_pairs_are_refused_at_the_start(two_models):
    save_pairs(two_models / "none.save", pack_pairs([]))
    with pytest.raises(InputError, match=r"^--pairs .*none\.save: holds no pairs$"):
        report_of(two_models, "--load_model", two_models / "base.pth", "--pairs", two_models / "none.save")


def test_pairs_of_the_run_are_told_and_those_of_another_preparation_refused(two_models, capsys):
    tuned = two_models / "out" / "rwkv-final.pth"
    pairs = load_pairs(two_models / "pairs.save")
    save_run(two_models, sha256=content_sha256(pairs, with_scores=True))
    save_pairs(two_models / "some.save", pairs.select([1]))
    save_pairs(two_models / "new.save", pack_pairs([([1, 2], [9], [5]), ([2], [3], [4])], np.zeros((2, 2))))
    for name, told in (
        ("some.save", f"all of its 1 pairs are in {two_models / 'pairs.save'}, which {tuned} was trained with, too"),
        ("new.save", "is not entirely held out: of its 2 pairs 1 have a prompt that is in"),
    ):
        report_of(two_models, "--load_model", tuned, "--pairs", two_models / name)
        assert told in capsys.readouterr().err
    # The run's file is another one by now: nothing is known of it but its preparation.
    save_run(two_models, sha256="0" * 64)
    report_of(two_models, "--load_model", tuned, "--pairs", two_models / "some.save")
    assert capsys.readouterr().err == ""
    other = replace(pairs, header={"source_id": "s", "preparation_id": "b" * 64})
    save_pairs(two_models / "other.save", other)
    with pytest.raises(InputError, match=r"--pairs .*other.save and .*pairs.save, which .*pth was trained with, are from two prep"):
        report_of(two_models, "--load_model", tuned, "--pairs", two_models / "other.save")


def test_a_prompt_needs_the_worlds_vocabulary(two_models):
    model = random_model(ModelShape(1, 32, 32, 96, 300, head_size=32), torch.float32)
    save_weights(model.state_dict(), two_models / "small.pth")
    message = r"^--prompt: text becomes tokens of the World tokenizer, 65536 of them; .*small\.pth has a vocabulary of 300$"
    with pytest.raises(InputError, match=message):
        report_of(two_models, "--load_model", two_models / "base.pth", two_models / "small.pth", "--prompt", "Why?")
