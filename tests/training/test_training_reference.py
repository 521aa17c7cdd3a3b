"""--dpo_ref: the reference is what scored the pair files, or the model as training starts."""

import functools
import json
import os

import numpy as np
import pytest
import torch
from conftest import random_model
from lives import hang, wait_for_hang
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.data.pair_files import load_pairs, save_original, save_pairs
from rwkv_dpo.data.pairs import join_pairs, pack_pairs
from rwkv_dpo.evaluation.scoring import score_pairs
from rwkv_dpo.files.hashed import file_sha256
from rwkv_dpo.files.journal import open_journal
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape

SHAPE = ModelShape(n_layer=1, n_embd=32, dim_att=32, dim_ffn=96, vocab_size=61, head_size=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two models, and pairs that the first one scored, and the same pairs unscored."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    models = [random_model(SHAPE, torch.float32, seed=seed) for seed in range(2)]
    for i, model in enumerate(models):
        save_weights(model.state_dict(), folder / f"model{i}.pth")
    for name, n in (("train", 10), ("valid", 5)):
        pairs = pack_pairs([tuple(rng.integers(1, 61, n) for n in rng.integers(2, 9, 3)) for _ in range(n)], header={"ctx_len": 12})
        save_pairs(folder / f"{name}-unscored.save", pairs)
        scored = pairs.with_ref_logps(score_pairs(models[0], pairs, 100), file_sha256(folder / "model0.pth"), "fp32")
        save_pairs(folder / f"{name}.save", scored)
        save_original(folder / f"{name}-original.save", scored)
    return folder


def flags(data, proj_dir, **changes):
    values = {
        "load_model": data / "model0.pth", "proj_dir": proj_dir, "ctx_len": 12, "dpo_train_file": data / "train.save", "dpo_beta": 0.1,
        "accelerator": "cpu", "precision": "fp32", "epoch_steps": 4, "epoch_count": 1, "micro_bsz": 2, "lr_init": 1e-3, "lr_final": 1e-4,
        "epoch_save": 1, "cpu_malloc": 0, "enable_progress_bar": False, "wkv_backend": "chunked", **changes,
    }  # fmt: skip
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def run(data, proj_dir, **changes):
    train.main(flags(data, proj_dir, **changes))
    return [json.loads(line) for line in (proj_dir / "metrics.jsonl").read_text().splitlines()]


def final_weights(proj_dir):
    return torch.load(proj_dir / "rwkv-final.pth", weights_only=True)


UNSCORED = {"dpo_train_file": "train-unscored.save", "dpo_valid_file": "valid-unscored.save"}
SCORED = {"dpo_train_file": "train.save", "dpo_valid_file": "valid.save"}


def files(data, named):
    return {flag: data / name for flag, name in named.items()}


def test_unscored_pairs_train_as_those_that_the_starting_model_scored(data, tmp_path):
    a = run(data, tmp_path / "a", **files(data, SCORED))
    b = run(data, tmp_path / "b", **files(data, UNSCORED), dpo_ref="recompute")
    for x, y in zip(a, b, strict=True):
        # fp32 rounding: other batches while scoring.
        assert {k: y[k] for k in ("loss", "ref_logps/chosen", "ref_logps/rejected")} == pytest.approx({
            k: x[k] for k in ("loss", "ref_logps/chosen", "ref_logps/rejected")
        }, rel=1e-5)  # fmt: skip
    assert (tmp_path / "a" / "valid.jsonl").exists()
    valid = [json.loads((tmp_path / name / "valid.jsonl").read_text()) for name in "ab"]
    assert valid[0].keys() == valid[1].keys()
    for name in ("loss_dpo", "logps/chosen", "logps/rejected", "ref_logps/chosen", "ref_logps/rejected"):
        assert valid[1][name] == pytest.approx(valid[0][name], rel=1e-5)


def test_recompute_makes_another_models_pairs_start_at_a_margin_of_0(data, tmp_path, caplog):
    other = data / "model1.pth"
    with caplog.at_level("INFO"):
        records = run(data, tmp_path / "out", load_model=other, dpo_ref="recompute")
    assert records[0]["loss_dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert "not the one that scored" not in caplog.text
    assert "was scored by another file" not in caplog.text
    assert run(data, tmp_path / "file", load_model=other)[0]["loss_dpo"] != pytest.approx(np.log(2), abs=1e-2)


def test_the_run_folder_keeps_the_scores_of_all_pairs(data, tmp_path):
    run(data, tmp_path, **files(data, UNSCORED), dpo_ref="recompute")
    kept = load_pairs(tmp_path / "reference.save")
    expected = join_pairs([load_pairs(data / name) for name in SCORED.values()])
    assert kept.tokens.tolist() == expected.tokens.tolist()
    assert kept.offsets.tolist() == expected.offsets.tolist()
    np.testing.assert_allclose(kept.ref_logps, expected.ref_logps, rtol=1e-5)


def test_a_continued_run_keeps_its_first_reference_and_a_new_one_scores_anew(data, tmp_path, caplog):
    settings = {**files(data, UNSCORED), "dpo_ref": "recompute"}
    run(data, tmp_path, **settings, lr_init=1e-2, lr_final=1e-2)
    first = (tmp_path / "reference.save").read_bytes()
    learned = tmp_path / "rwkv-0.pth"
    with caplog.at_level("INFO"):
        records = run(data, tmp_path, **settings, lr_init=1e-2, lr_final=1e-2, load_model=learned, epoch_begin=1)
    assert "reference log-probabilities of 15 pairs from" in caplog.text
    assert (tmp_path / "reference.save").read_bytes() == first
    # What was learned in the first epoch shows: the reference is not the model that goes on.
    assert records[4]["loss_dpo"] < 0.69

    run(data, tmp_path, **settings, lr_init=1e-2, lr_final=1e-2, overwrite=1)
    assert (tmp_path / "reference.save").read_bytes() == first == (tmp_path / "earlier-1" / "reference.save").read_bytes()
    learned = tmp_path / "earlier-1" / "rwkv-0.pth"
    caplog.clear()
    with caplog.at_level("INFO"):
        records = run(data, tmp_path, **settings, lr_init=1e-2, lr_final=1e-2, load_model=learned, overwrite=1)
    assert "scored 15 pairs with the model that training starts from" in caplog.text
    assert records[0]["loss_dpo"] == pytest.approx(np.log(2), abs=1e-5)
    assert (tmp_path / "reference.save").read_bytes() != first


def test_a_continued_run_without_its_scores_says_so(data, tmp_path, caplog):
    run(data, tmp_path, dpo_ref="recompute")
    (tmp_path / "reference.save").unlink()
    run(data, tmp_path, dpo_ref="recompute", load_model=tmp_path / "rwkv-0.pth", epoch_begin=1)
    assert "reference.save does not exist: the reference is the model that this run continues from" in caplog.text


def test_pairs_of_another_checkpoint_or_length_are_told_in_one_line_each(data, tmp_path, caplog):
    def warned(name, **changes):
        caplog.clear()
        run(data, tmp_path / name, **changes)
        return [record.message for record in caplog.records if record.levelname == "WARNING" and "was " in record.message]

    assert warned("same") == []
    assert warned("original", dpo_train_file=data / "train-original.save", load_model=data / "model1.pth") == []  # nothing to compare
    (line,) = warned("other", load_model=data / "model1.pth")
    scored_by, loaded = (file_sha256(data / f"model{i}.pth")[:12] for i in range(2))
    assert f"--dpo_train_file {data / 'train.save'} was scored by another file (sha256 {scored_by}...)" in line
    assert f"--load_model {data / 'model1.pth'} ({loaded}...); --dpo_ref recompute" in line
    (line,) = warned("new", load_model=None, n_layer=1, n_embd=32, vocab_size=61, head_size_a=8)
    assert "than training starts from, initial weights; --dpo_ref recompute" in line
    lines = warned("length", ctx_len=13, dpo_valid_file=data / "valid.save")
    assert [line.split(" was ")[0].split()[0] for line in lines] == ["--dpo_train_file", "--dpo_valid_file"]
    assert lines[0].endswith("was truncated to a ctx_len of 12, training has --ctx_len 13; the pairs are used unchanged")


def test_unscored_pairs_are_refused_with_the_ways_out(data, tmp_path):
    for flag, name in UNSCORED.items():
        with pytest.raises(InputError, match=rf"--{flag} .*{name}: its pairs have no reference .*prepare_pairs.py.*--dpo_ref recompute"):
            run(data, tmp_path / "out", **{flag: data / name})


def test_a_model_that_gives_no_number_is_told(data, tmp_path):
    model = random_model(SHAPE, torch.float32)
    with torch.no_grad():
        model.head.weight[3] = float("nan")
    save_weights(model.state_dict(), tmp_path / "nan.pth")
    with pytest.raises(InputError, match=r"--dpo_ref recompute: the model .* non-finite"):
        run(data, tmp_path / "out", load_model=tmp_path / "nan.pth", dpo_ref="recompute")
    assert not (tmp_path / "out" / "reference.save").exists()


def score_only(n_batches):
    """The process dies when it is about to score another batch."""
    hang("rwkv_dpo.training.reference:score_batch", n_batches + 1)


def count_batches():
    from rwkv_dpo.training import reference

    score = reference.score_batch

    def counted(*arguments):
        os.write(1, b"SCORED\n")
        return score(*arguments)

    reference.score_batch = counted


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_scoring_that_is_killed_goes_on_from_its_journal_to_the_same_bytes(data, tmp_path, lives, n):
    def start(name, prepare):
        layout = {"devices": n, "strategy": "ddp" if n > 1 else "auto"}
        wanted = flags(data, tmp_path / name, **files(data, UNSCORED), dpo_ref="recompute", ctx_len=8, epoch_steps=1, **layout)
        log = tmp_path / f"{len(list(tmp_path.glob('*.txt')))}.txt"
        return lives.start(wanted, log, n, prepare), log

    whole, log = start("whole", count_batches)
    assert set(lives.end(whole, log)) == {0}, log.read_text()
    n_batches = log.read_text().count("SCORED\n")
    assert n_batches > 6

    killed, log = start("out", functools.partial(score_only, 2))
    wait_for_hang(killed, log)
    for process in killed:
        process.kill()
    lives.end(killed, log)
    assert (tmp_path / "out" / "reference.journal").exists()
    assert not (tmp_path / "out" / "reference.save").exists()

    resumed, log = start("out", count_batches)
    assert set(lives.end(resumed, log)) == {0}, log.read_text()
    assert log.read_text().count("SCORED\n") == n_batches - 2 * n
    assert log.read_text().count("of 15 pairs from") == 1
    assert (tmp_path / "out" / "reference.save").read_bytes() == (tmp_path / "whole" / "reference.save").read_bytes()
    assert not (tmp_path / "out" / "reference.journal").exists()


def test_scores_of_another_reference_are_not_taken_from_a_journal(data, tmp_path, caplog, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("rwkv_dpo.training.reference.score_batch", lambda *_: {}["the run dies here"])
        with pytest.raises(KeyError):
            run(data, tmp_path, dpo_ref="recompute")
    with open_journal(tmp_path / "reference.journal", bytes(32)) as journal:
        journal.append(np.full((1, 2), -7.0).tobytes())
    with caplog.at_level("INFO"):
        run(data, tmp_path, dpo_ref="recompute")
    assert "scored 10 pairs with the model that training starts from" in caplog.text
    assert "of 10 pairs from" not in caplog.text


def test_a_journal_that_cannot_be_written_ends_the_run_in_a_line(data, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_dpo.training.reference.JOURNAL", "missing/reference.journal")
    with pytest.raises(InputError, match=r"reference.journal: cannot be written: No such file"):
        run(data, tmp_path, dpo_ref="recompute")
