"""The check before the first step sees another model, in whatever arithmetic the run is, and takes rounding for what it is."""

import re

import numpy as np
import pytest
import runs
import torch
from conftest import random_model
from runs import TINY, write_inputs
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.data.pair_files import save_original, save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.devices.device import COMPUTE_DTYPES
from rwkv_dpo.evaluation.scoring import score_pairs
from rwkv_dpo.files.hashed import file_sha256
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.training.reference_check import shortest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Also the model with one matrix that is a hundredth larger, and the pairs as the model scores them in bf16."""
    folder = tmp_path_factory.mktemp("data")
    pairs = write_inputs(folder, TINY, 12)
    save_original(folder / "original.save", pairs)
    model = random_model(TINY, torch.float32)
    model.compute_dtype = COMPUTE_DTYPES["bf16"]
    save_pairs(folder / "bf16.save", pairs.with_ref_logps(score_pairs(model, pairs, 100), file_sha256(folder / "model.pth"), "bf16"))
    with torch.no_grad():
        model.blocks[1].ffn.value.weight *= 1.01
    save_weights(model.state_dict(), folder / "near.pth")
    save_weights(random_model(TINY, torch.float32, seed=1).state_dict(), folder / "other.pth")
    return folder


def check(data, proj_dir, caplog, precision, **changes) -> tuple[float, str, float, bool]:
    """Mean |margin|, in what arithmetic, what rounding explains, and whether the run was warned of."""
    caplog.clear()
    with caplog.at_level("INFO"):
        train.main(runs.flags(data, proj_dir, precision=precision, epoch_steps=1, epoch_count=1, **changes))
    line = next(message for message in caplog.messages if message.startswith("step 0"))
    found = re.match(r"step 0: mean \|margin\| of 8 short pairs (\S+) nats \(in (\w+); rounding explains up to ([^;)]+)", line)
    return float(found[1]), found[2], float(found[3]), "not the one that scored dpo_train_file" in caplog.text


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_reference_of_fp32_is_compared_in_fp32_in_any_run(data, tmp_path, caplog, precision):
    margin, arithmetic, explained, is_warned = check(data, tmp_path / "right", caplog, precision)
    assert margin < 1e-4
    assert (arithmetic, explained, is_warned) == ("fp32", 1e-3, False)
    if precision != "fp32":
        # What a user who did all right will meet in metrics.jsonl.
        assert re.search(rf"training sees them in {precision}, with 0\.0\d+ nats of rounding", caplog.text)
    margin, *_, is_warned = check(data, tmp_path / "near", caplog, precision, load_model=data / "near.pth")
    assert margin > 1e-3
    assert is_warned


def test_a_reference_of_bf16_is_compared_in_bf16_within_its_rounding(data, tmp_path, caplog):
    in_bf16 = {"dpo_train_file": data / "bf16.save"}
    for precision in ("fp32", "bf16"):
        _, arithmetic, explained, is_warned = check(data, tmp_path / precision, caplog, precision, **in_bf16)
        # 8 bits of a log-probability of a few nats, and some ten of them in a pair.
        assert 2**-8 < explained < 1
        assert (arithmetic, is_warned) == ("bf16", False)
    *_, is_warned = check(data, tmp_path / "other", caplog, "bf16", load_model=data / "other.pth", **in_bf16)
    assert is_warned


def test_a_file_that_does_not_say_in_what_it_was_scored_may_be_as_coarse_as_bf16(data, tmp_path, caplog):
    original = {"dpo_train_file": data / "original.save"}
    margin, arithmetic, explained, is_warned = check(data, tmp_path / "right", caplog, "bf16", **original)
    assert margin < 1e-4
    assert (arithmetic, is_warned) == ("fp32", False)
    assert explained > 2**-8
    assert check(data, tmp_path / "other", caplog, "bf16", load_model=data / "other.pth", **original)[-1]


def test_margins_that_are_no_number_are_not_taken_for_0(data, tmp_path, caplog):
    model = random_model(TINY, torch.float32)
    with torch.no_grad():
        model.head.weight[3] = float("nan")
    save_weights(model.state_dict(), tmp_path / "nan.pth")
    with pytest.raises(InputError, match=r"head\.weight is not finite"):
        check(data, tmp_path / "out", caplog, "fp32", load_model=tmp_path / "nan.pth")
    assert "the starting model is not the one that scored dpo_train_file (mean |margin| nan nats" in caplog.text


def test_the_shortest_pairs_are_looked_at():
    lengths = [9, 3, 8, 4, 3, 7, 6, 5, 9, 2, 8]
    rows = [1, 2, 3, 4, 5, 6, 7, 9]
    checked = shortest(pack_pairs([([i + 1] * n, [2], [3]) for i, n in enumerate(lengths)], np.arange(22.0).reshape(11, 2)))
    assert [checked.pair(i)[0][0] - 1 for i in range(8)] == rows
    assert checked.ref_logps.tolist() == [[2.0 * row, 2.0 * row + 1] for row in rows]
