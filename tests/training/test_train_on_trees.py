"""Runs whose samples are trees of unequal size: resumed, on two processes, and by every loss."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import runs
import torch
from runs import TINY, run_to
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.data.trees import grow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 prompts with two to five answers each, in all of their pairs; no margin begins near 0, where its sign would be rounding."""
    folder = tmp_path_factory.mktemp("data")
    runs.write_inputs(folder, TINY, 4)
    rng = np.random.default_rng(1)
    rows, scores, refs = [], [], []
    for i in range(12):
        prompt, *answers = (rng.integers(1, TINY.vocab_size, n) for n in rng.integers(2, 9, 3 + i % 4))
        logps = -20 - 3.0 * rng.permutation(len(answers))
        for a in range(len(answers)):
            for b in range(a + 1, len(answers)):
                rows.append((prompt, answers[a], answers[b]))
                scores.append((len(answers) - a, len(answers) - b))
                refs.append((logps[a], logps[b]))
    pairs = grow(pack_pairs(rows, np.array(refs), scores=np.array(scores, float)), 1000).pairs
    assert (pairs.n_trees, len(pairs)) == (12, 3 * (1 + 3 + 6 + 10))
    save_pairs(folder / "trees.save", pairs.select(range(len(pairs))))
    held_out = pack_pairs([(np.append(prompt, 1), *answers) for prompt, *answers in rows], np.array(refs), scores=np.array(scores, float))
    save_pairs(folder / "valid.save", grow(held_out, 1000).pairs)
    return folder


flags = functools.partial(runs.flags, dpo_train_file="DATA/trees.save", dpo_valid_file="DATA/valid.save", adam_eps=1e-5)


def result(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return records, torch.load(folder / "rwkv-final.pth", weights_only=True)


@pytest.mark.parametrize("loss", ["sigmoid", "plackett_luce"])
def test_a_resumed_run_ends_with_the_same_bytes_and_counts_every_pair(data, tmp_path, loss):
    train.main(flags(data, tmp_path / "whole", dpo_loss=loss, epoch_steps=6, epoch_count=1))
    run_to(4, flags(data, tmp_path / "parts", dpo_loss=loss, epoch_steps=6, epoch_count=1))
    train.main(flags(data, tmp_path / "parts", dpo_loss=loss, epoch_steps=6, epoch_count=1))
    assert (tmp_path / "whole" / "rwkv-final.pth").read_bytes() == (tmp_path / "parts" / "rwkv-final.pth").read_bytes()
    records, _ = result(tmp_path / "parts")
    # 6 steps of two trees are one pass.
    assert records[-1]["pairs_seen"] == len(load_pairs(data / "trees.save"))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sigmoid", "plackett_luce", "aot,sft"])
def test_two_processes_of_one_tree_train_as_one_process_of_two(data, tmp_path, lives, loss):
    """Of a step's trees one has up to ten times the pairs of the other: each pair, or ranking, counts as much on either rank, and losses
    over a batch see both."""
    lives.trained(flags(data, tmp_path / "one", dpo_loss=loss), tmp_path / "one.log")
    two = {"devices": 2, "strategy": "ddp", "micro_bsz": 1}
    lives.trained(flags(data, tmp_path / "two", dpo_loss=loss, **two), tmp_path / "two.log", 2)
    (records, weights), (others, other_weights) = result(tmp_path / "one"), result(tmp_path / "two")
    assert len(records) == 8
    for a, b in zip(records, others, strict=True):
        for name in a.keys() - {"tokens_per_s", "peak_memory_gb"}:
            # As in test_many_processes: fp32 sums, and rounding that moves weights shows tenfold in the norm of the gradients.
            assert b[name] == pytest.approx(a[name], rel=1e-4 if name == "grad_norm" else 1e-5, abs=1e-5), (a["step"], name)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    held_out = [json.loads((tmp_path / folder / "valid.jsonl").read_text().splitlines()[-1]) for folder in ("one", "two")]
    assert held_out[1]["loss_dpo"] == pytest.approx(held_out[0]["loss_dpo"], rel=1e-4)


def test_losses_without_a_reference_train_on_pairs_that_nobody_scored(data, tmp_path):
    pairs = load_pairs(data / "trees.save")
    save_pairs(tmp_path / "bare.save", replace(pairs, ref_logps=np.full((len(pairs), 2), np.nan)))
    bare = {"dpo_train_file": tmp_path / "bare.save", "dpo_valid_file": None, "epoch_steps": 2, "epoch_count": 1}
    train.main(flags(data, tmp_path / "out", dpo_loss="simpo,orpo", **bare))
    records, _ = result(tmp_path / "out")
    assert records[-1]["rewards/chosen"] == pytest.approx(0.1 * records[-1]["logps/chosen"], rel=1e-5)
    with pytest.raises(InputError, match=r"bare\.save: its pairs have no reference log-probabilities, which --dpo_loss simpo,ipo needs"):
        train.main(flags(data, tmp_path / "other", dpo_loss="simpo,ipo", **bare))
