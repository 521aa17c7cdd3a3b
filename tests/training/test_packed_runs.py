"""--batch_tokens in whole runs: the same training in fewer model calls, on one process and on two, also resumed; and what is refused."""

import functools
import json

import numpy as np
import pytest
import runs
import torch
from runs import SHARDED, TINY, run_to
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.data.trees import grow
from rwkv_dpo.training.module import DPOModule
from sampled import PAIRS

# Windows of 12 tokens and pairs of up to 22: a step of 12 of either is some 300 tokens, in 6 calls, or in 5 of up to 80.
STEPS = {"micro_bsz": 2, "accumulate_grad_batches": 6, "epoch_steps": 24, "epoch_count": 1, "adam_eps": 1e-5}
flags = functools.partial(runs.flags, **STEPS)


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """Trees, whose references have no margin near 0, where the sign of a reward would be rounding."""
    folder = tmp_path_factory.mktemp("data")
    runs.write_inputs(folder, TINY, 4)
    save_pairs(folder / "trees.save", PAIRS)
    return folder


def result(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return records, torch.load(folder / "rwkv-final.pth", weights_only=True)


def assert_same(one, other):
    (records, weights), (other_records, other_weights) = one, other
    assert len(records) == len(other_records) > 0
    for a, b in zip(records, other_records, strict=True):
        assert list(a) == list(b)
        for name in a.keys() - {"tokens_per_s", "peak_memory_gb"}:
            # As in test_many_processes: fp32 sums, and rounding that moves weights shows tenfold in the norm of the gradients.
            assert b[name] == pytest.approx(a[name], rel=1e-4 if name == "grad_norm" else 1e-5, abs=1e-5), (a["step"], name)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Gets the model calls of each optimizer step."""
    counts: list[int] = []
    begin = DPOModule.on_train_batch_start

    def counting(module, batch, batch_idx):
        counts.append(len(batch))
        begin(module, batch, batch_idx)

    monkeypatch.setattr(DPOModule, "on_train_batch_start", counting)
    return counts


@pytest.mark.parametrize("changes", [
    {}, {"chunk_ctx": 16}, {"dpo_ref": "recompute"}, {"dpo": 0}, {"dpo_general_corpus_ratio": 0, "dpo_loss": "sigmoid,sft"},
    {"dpo_loss": "plackett_luce,sft"}, {"dpo_wpo": 1}, {"dpo_ref": "recompute", "dpo_sync_ref": 1}, {"strategy": "deepspeed_stage_2"},
], ids=str)  # fmt: skip
def test_a_packed_run_trains_as_one_that_is_not(trees, tmp_path, calls, changes):
    own = {"dpo_train_file": "DATA/trees.save", **changes}
    train.main(flags(trees, tmp_path / "plain", **own))
    train.main(flags(trees, tmp_path / "packed", batch_tokens=130, **own))
    assert calls[:4] == [6] * 4
    assert max(calls[4:]) < 6
    assert_same(result(tmp_path / "plain"), result(tmp_path / "packed"))


def test_a_packed_run_that_is_resumed_ends_with_the_same_bytes(trees, tmp_path):
    own = {"dpo_train_file": "DATA/trees.save", "batch_tokens": 60, "epoch_steps": 36, "dropout": 0.1}
    train.main(flags(trees, tmp_path / "whole", **own))
    run_to(3, flags(trees, tmp_path / "parts", **own))
    assert list((tmp_path / "parts" / "last").glob("step-3.pth"))
    train.main(flags(trees, tmp_path / "parts", **own))
    assert (tmp_path / "whole" / "rwkv-final.pth").read_bytes() == (tmp_path / "parts" / "rwkv-final.pth").read_bytes()
    # One epoch, whose train_log.txt line is the mean over all of its steps.
    line = [(tmp_path / name / "train_log.txt").read_text().splitlines()[-1].split()[:4] for name in ("whole", "parts")]
    assert line[0] == line[1]


def test_a_run_may_go_on_packed_otherwise(trees, tmp_path):
    """Pairs of one tree each count alike in every way to form groups of them."""
    own = {"epoch_steps": 36}
    train.main(flags(trees, tmp_path / "whole", **own))
    run_to(3, flags(trees, tmp_path / "parts", **own))
    other = {"batch_tokens": 60, "micro_bsz": 3, "accumulate_grad_batches": 4, "epoch_steps": 24}
    train.main(flags(trees, tmp_path / "parts", **other))
    assert_same(result(tmp_path / "whole"), result(tmp_path / "parts"))


def test_the_samples_of_a_bad_call_are_named(data, tmp_path, caplog):
    """Of ten pairs one has a reference that overflows; alone in a call, it is named alone."""
    pairs = load_pairs(data / "train.save")
    bad, longest = pairs.ref_logps.copy(), int(pairs.tree_tokens.argmax())
    bad[longest] = 3e38, -3e38
    save_pairs(tmp_path / "bad.save", pairs.with_ref_logps(bad, "0" * 64, "fp32"))
    own = {"dpo_train_file": tmp_path / "bad.save", "dpo_general_corpus_ratio": 0, "data_file": None, "data_type": None, "dpo_beta": 10}
    own |= {"micro_bsz": 10, "accumulate_grad_batches": 1, "epoch_steps": 1, "batch_tokens": int(pairs.tree_tokens.max())}
    train.main(flags(data, tmp_path / "out", **own))
    assert f"skipped; it had pairs in rows {longest} of dpo_train_file" in caplog.text


def test_what_is_longer_than_a_call_is_refused_by_its_row(data, tmp_path):
    pairs = load_pairs(data / "train.save")
    tokens, row = int(pairs.tree_tokens.max()), int(pairs.tree_tokens.argmax()) + 1
    words = (
        rf"^--batch_tokens {tokens - 1}: row {row} of --dpo_train_file .*train.save has {tokens} tokens; at least that many are accepted$"
    )
    for dry_run in (0, 1):
        with pytest.raises(InputError, match=words):
            train.main(flags(data, tmp_path / "out", batch_tokens=tokens - 1, dry_run=dry_run))
    prompt, one, two, three = (np.full(n, n) for n in (4, 5, 6, 7))
    rows = [([9], [8], [7]), (prompt, one, two), (prompt, one, three)]
    save_pairs(tmp_path / "trees.save", grow(pack_pairs(rows, np.zeros((3, 2))), 100).pairs)
    with pytest.raises(InputError, match=r"^--batch_tokens 21: the tree of rows 2 to 3 of --dpo_train_file .* has 22 tokens"):
        train.main(flags(data, tmp_path / "out", batch_tokens=21, dpo_train_file=tmp_path / "trees.save"))


def test_a_dry_run_counts_what_a_call_holds(trees, tmp_path, capsys):
    own = {"dpo_train_file": "DATA/trees.save", "dry_run": 1}
    reports = []
    for batch_tokens in (0, 60, 10_000):
        train.main(flags(trees, tmp_path, batch_tokens=batch_tokens, **own))
        reports.append(capsys.readouterr().out)
    assert "largest micro-batch: 2 x 12 tokens of corpus and the 2 longest of 14 trees of " in reports[0]
    # Five windows are 60 tokens, and leave no room.
    assert "largest micro-batch: 5 x 12 tokens of corpus; 60 tokens, 60 of them scored" in reports[1]
    assert "largest micro-batch: 12 x 12 tokens of corpus and the 12 longest of 14 trees of " in reports[2]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"strategy": "ddp"}, {"strategy": "deepspeed_stage_1"}, {"strategy": "deepspeed_stage_2"}, {"strategy": "deepspeed_stage_3"},
    {"strategy": "ddp", "chunk_ctx": 16}, {"strategy": "ddp", "batch_tokens": 0}, {"strategy": "deepspeed_stage_2", "batch_tokens": 0},
    {"strategy": "deepspeed_stage_3", "batch_tokens": 0},
], ids=str)  # fmt: skip
def test_two_packed_processes_train_as_one_that_is_not(lives, tmp_path, wide, changes):
    two = {"devices": 2, "micro_bsz": 1, "batch_tokens": 90, **changes}
    lives.trained(flags(wide[0], tmp_path / "out", cpu_malloc=None, **two), tmp_path / "log", 2)
    assert_same(wide[1], result(tmp_path / "out"))


@pytest.fixture(scope="module")
def wide(lives, tmp_path_factory):
    """Files of a model whose matrices ZeRO-3 shares out, and a run on one process, of 6 x 2 samples a step, against which others are held.
    Rewards are not near 0, where their signs would be rounding."""
    folder = tmp_path_factory.mktemp("wide")
    pairs = runs.write_inputs(folder, SHARDED, 50, longest=29)
    refs = pairs.ref_logps + np.where(np.arange(50)[:, None] % 2, [0.0, 1.0], [0.0, -1.0])
    save_pairs(folder / "train.save", pairs.with_ref_logps(refs, "0" * 64, "fp32"))
    lives.trained(flags(folder, folder / "one", cpu_malloc=None), folder / "one.log")
    return folder, result(folder / "one")
