"""A run that goes on at another number of processes or under another strategy; the data and launcher of test_many_processes."""

import signal
import time
from itertools import pairwise

import pytest
from test_many_processes import assert_same, data, finish, launch, one_process, result  # noqa: F401 (fixtures among them)

pytestmark = pytest.mark.slow
DDP = {"devices": 2, "strategy": "ddp"}
ONE = {"devices": 1, "strategy": "auto", "micro_bsz": 2}


def stage(n):
    return {"devices": 2, "strategy": f"deepspeed_stage_{n}"}


@pytest.mark.parametrize(("first", "then"), [
    (DDP, ONE), (ONE, stage(2)), (stage(2), stage(3)), (stage(3), DDP), (stage(1), {**stage(3), "devices": 3}),
], ids=str)  # fmt: skip
def test_a_run_goes_on_under_another_strategy_as_if_nothing_had_changed(data, tmp_path, one_process, first, then):  # noqa: F811 (fixtures)
    out = tmp_path / "out"
    process = launch(data, out, **first)
    while process.poll() is None:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_bytes().count(b"\n") >= 8:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    assert "the same command goes on" in finish(process)
    finish(launch(data, out, **then))
    if then.get("devices") == 3:
        # 3 samples a step instead of 2: another training, but every step is there and the samples follow on.
        records, _ = result(out)
        taken = [r["pairs_seen"] for r in records]
        assert len(taken) == 20
        assert {b - a for a, b in pairwise(taken)} == {2, 3}
        return
    assert_same(one_process, result(out))
