"""A run that goes on at another number of processes or under another strategy; the data of test_many_processes."""

import os
import signal
import time
from itertools import pairwise

import pytest
from test_many_processes import assert_same, data, flags, one_process, result, trained  # noqa: F401 (fixtures among them)

pytestmark = pytest.mark.slow
DDP = {"devices": 2, "strategy": "ddp"}
ONE = {"devices": 1, "strategy": "auto", "micro_bsz": 2}


def stage(n):
    return {"devices": 2, "strategy": f"deepspeed_stage_{n}"}


@pytest.mark.parametrize(("first", "then"), [
    (DDP, ONE), (ONE, stage(2)), (stage(2), stage(3)), (stage(3), DDP), (stage(1), {**stage(3), "devices": 3}),
], ids=str)  # fmt: skip
def test_a_run_goes_on_under_another_strategy_as_if_nothing_had_changed(lives, data, tmp_path, one_process, first, then):  # noqa: F811
    out, log = tmp_path / "out", tmp_path / "first.log"
    processes = lives.start(flags(data, out, **first), log, first["devices"])
    while all(process.is_alive() for process in processes):
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes().count(b"\n") >= 8:
            os.kill(processes[0].pid, signal.SIGTERM)
            break
        time.sleep(0.001)
    lives.end(processes, log)
    assert "the same command continues" in log.read_text()
    trained(lives, data, out, **then)
    if then.get("devices") == 3:
        # 3 samples a step instead of 2: another training, but every step is there and the samples follow on.
        records, _ = result(out)
        taken = [r["pairs_seen"] for r in records]
        assert len(taken) == 20
        assert {b - a for a, b in pairwise(taken)} == {2, 3}
        return
    assert_same(one_process, result(out))
