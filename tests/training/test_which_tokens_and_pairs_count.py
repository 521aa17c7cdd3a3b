"""--dpo_ld_alpha and --dpo_wpo in whole runs."""

import json
import math

import pytest
import torch
from runs import flags
from rwkv_dpo.commands import train


def test_the_reference_counts_the_tokens_that_the_policy_counts(data, tmp_path, caplog):
    """LD-DPO: at the first step the policy is its own reference, whatever an answer's last tokens count for."""
    own = {"dpo_ref": "recompute", "dpo_ld_alpha": 0.25, "eval_every": 4, "dpo_valid_file": "DATA/valid.save", "epoch_count": 1}
    train.main(flags(data, tmp_path / "ld", **own))
    train.main(flags(data, tmp_path / "dpo", **{**own, "dpo_ld_alpha": 1.0}))
    found = {name: [json.loads(line) for line in (tmp_path / name / "valid.jsonl").read_text().splitlines()] for name in ("ld", "dpo")}
    for name in found:
        assert found[name][0]["loss_dpo"] == pytest.approx(math.log(2), abs=1e-6)
        assert found[name][0]["ref_logps/chosen"] == pytest.approx(found[name][0]["logps/chosen"], abs=1e-5)
    assert found["ld"][0]["ref_logps/chosen"] > found["dpo"][0]["ref_logps/chosen"] + 0.1
    assert not [record for record in caplog.records if "is not the one that scored" in record.message]


def test_wpo_trains_by_other_weights(data, tmp_path):
    ends = []
    for wpo, chunk_ctx in ((0, 0), (1, 0), (1, 16)):
        train.main(flags(data, tmp_path / f"{wpo}{chunk_ctx}", dpo_wpo=wpo, chunk_ctx=chunk_ctx, adam_eps=1e-5, epoch_count=1))
        ends.append(torch.load(tmp_path / f"{wpo}{chunk_ctx}" / "rwkv-final.pth"))
    names = list(ends[0])
    assert any((ends[0][name] - ends[1][name]).abs().max() > 1e-4 for name in names)
    assert all((ends[1][name] - ends[2][name]).abs().max() < 1e-5 for name in names)
