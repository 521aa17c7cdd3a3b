"""The same training on any number of processes: `train.py` on CPU processes, launched by itself, by torchrun or as Slurm does. Where the
way of launching is not the matter, `lives` starts the processes, which takes less than the training then."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from lives import free_port
from runs import SHARDED, environment, write_inputs
from rwkv_dpo.data.pair_files import load_pairs, save_pairs

pytestmark = pytest.mark.slow
TRAIN = Path(__file__).resolve().parents[2] / "RWKV-v5" / "train.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """With pairs of uneven lengths. Rejected answers are a nat more, or less, probable to their reference than to the model: a margin
    that begins at 0 has the sign of its rounding, and metrics count signs."""
    folder = tmp_path_factory.mktemp("data")
    pairs = write_inputs(folder, SHARDED, 50, longest=29)
    save_pairs(folder / "scored.save", pairs)
    refs = pairs.ref_logps + np.where(np.arange(50)[:, None] % 2, [0.0, 1.0], [0.0, -1.0])
    save_pairs(folder / "train.save", pairs.with_ref_logps(refs, "0" * 64, "fp32"))
    return folder


# Adam's epsilon is above the rounding of gradients, by which it would divide others: it would move such weights anywhere.
flags = functools.partial(runs.flags, epoch_steps=20, epoch_count=1, micro_bsz=1, cpu_malloc=None,
                          lr_init=1e-4, lr_final=1e-5, weight_decay=0.1, adam_eps=1e-5)  # fmt: skip


def launch(data, proj_dir, launcher=(sys.executable,), variables=None, **changes) -> subprocess.Popen:
    command, own = [*launcher, str(TRAIN), *flags(data, proj_dir, **changes)], environment(**(variables or {}))
    return subprocess.Popen(command, cwd=data, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> str:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)[-5000:]
    return "".join(outputs)


def trained(lives, data, proj_dir, **changes) -> str:
    """What a run of that many `devices` printed."""
    return lives.trained(flags(data, proj_dir, **changes), proj_dir.with_suffix(".log"), changes.get("devices", 1))


def result(proj_dir) -> tuple[list[dict], dict[str, torch.Tensor]]:
    records = [json.loads(line) for line in (proj_dir / "metrics.jsonl").read_text().splitlines()]
    return records, torch.load(proj_dir / "rwkv-final.pth", weights_only=True)


@pytest.fixture(scope="module")
def one_process(lives, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "out"
    trained(lives, data, folder, micro_bsz=2)
    return result(folder)


def assert_same(one, many):
    (records, weights), (other_records, other_weights) = one, many
    assert [r["step"] for r in other_records] == list(range(1, len(records) + 1))
    for a, b in zip(records, other_records, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tokens_per_s", "peak_memory_gb"}:
            # fp32 sums of 30 terms, and for rewards the difference of two of them near 100 (roundings of 8e-6) times a beta of 0.1.
            # Rounding that moves weights by 1e-6 shows tenfold in the norm of the gradients.
            assert b[name] == pytest.approx(a[name], rel=1e-4 if name == "grad_norm" else 1e-5, abs=1e-5), (a["step"], name)
    for name, weight in weights.items():
        # Rounding of 1e-9 in gradients of norm 1, over an epsilon of 1e-5, is a ten-thousandth of a rate of 1e-4 in each of 20 steps.
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("changes", [
    {"strategy": "ddp"}, {"strategy": "deepspeed_stage_1"}, {"strategy": "deepspeed_stage_2"}, {"strategy": "deepspeed_stage_3"},
    {"strategy": "deepspeed_stage_3", "grad_cp": 1}, {"strategy": "deepspeed_stage_3", "grad_cp": "selective"},
    {"strategy": "ddp", "chunk_ctx": 16, "grad_cp": 1},
    {"strategy": "deepspeed_stage_2", "chunk_ctx": 16},
], ids=str)  # fmt: skip
def test_two_processes_of_one_sample_train_as_one_process_of_two(lives, data, tmp_path, one_process, changes):
    trained(lives, data, tmp_path / "out", devices=2, **changes)
    assert_same(one_process, result(tmp_path / "out"))


@pytest.mark.parametrize("version", ["6", "7"])
def test_newer_versions_train_on_two_processes_as_on_one(lives, tmp_path, version):
    pairs = write_inputs(tmp_path, replace(SHARDED, version=version), 50, longest=29)
    refs = pairs.ref_logps + np.where(np.arange(50)[:, None] % 2, [0.0, 1.0], [0.0, -1.0])
    save_pairs(tmp_path / "train.save", pairs.with_ref_logps(refs, "0" * 64, "fp32"))
    trained(lives, tmp_path, tmp_path / "one", micro_bsz=2, epoch_steps=6)
    for strategy in ("ddp", "deepspeed_stage_3"):
        trained(lives, tmp_path, tmp_path / strategy, devices=2, strategy=strategy, epoch_steps=6)
        assert_same(result(tmp_path / "one"), result(tmp_path / strategy))


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_2"])
def test_train_py_launches_its_other_processes_itself(data, tmp_path, one_process, strategy):
    finish(launch(data, tmp_path / "out", devices=2, strategy=strategy))
    assert_same(one_process, result(tmp_path / "out"))


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_two_processes_share_the_scoring_of_the_reference(lives, data, tmp_path, one_process, strategy):
    output = trained(lives, data, tmp_path / "out", devices=2, strategy=strategy, dpo_ref="recompute")
    assert output.count("scored 50 pairs with the model that training starts from") == 1
    scored = load_pairs(tmp_path / "out" / "reference.save").ref_logps
    # fp32 sums of up to 30 terms; a row that both ranks, or none, had scored would be off by all of it.
    np.testing.assert_allclose(scored, load_pairs(data / "scored.save").ref_logps, rtol=1e-5)
    records, _ = result(tmp_path / "out")
    for a, b in zip(one_process[0], records, strict=True):
        assert b["ref_logps/chosen"] == pytest.approx(a["ref_logps/chosen"], rel=1e-5)
    # Margins of the model from itself: 0 but for roundings of 1e-5 nats, times beta.
    assert records[0]["loss_dpo"] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.parametrize(("optim", "strategy"), [
    ("adamw_bf16state", "ddp"), ("adamw_bf16state", "deepspeed_stage_2"), ("adamw_bf16state", "deepspeed_stage_3"),
    ("adamw8bit", "ddp"), ("adamw8bit", "deepspeed_stage_2"),
])  # fmt: skip
def test_small_moments_train_on_two_processes_as_fp32_ones_on_one(lives, data, tmp_path, one_process, optim, strategy):
    trained(lives, data, tmp_path / "out", devices=2, optim=optim, strategy=strategy)
    records, _ = result(tmp_path / "out")
    for a, b in zip(one_process[0], records, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.01), a["step"]


def torchrun(node: int, port: str) -> dict:
    agent = ("-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1")
    return {"launcher": (sys.executable, *agent, "--master_addr", "127.0.0.1", "--master_port", port)}


def srun(node: int, port: str) -> dict:
    """What Slurm's srun, which is not here, puts into the environment of a task; see its manual page."""
    job = {"NTASKS": 2, "NNODES": 2, "NTASKS_PER_NODE": 1, "PROCID": node, "NODEID": node, "LOCALID": 0, "JOB_ID": 1, "JOB_NAME": "train"}
    return {"variables": {**{f"SLURM_{k}": str(v) for k, v in job.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}}


@pytest.mark.parametrize("node_of", [torchrun, srun])
def test_two_nodes_train_as_one_process_and_the_first_alone_writes(data, tmp_path, one_process, node_of):
    port = str(free_port())
    output = finish(*(launch(data, tmp_path / f"node{i}", num_nodes=2, strategy="ddp", **node_of(i, port)) for i in range(2)))
    assert output.count("epochs 0 to 0, 20 optimizer steps of 1 x 1 x 2 samples") == 1
    assert_same(one_process, result(tmp_path / "node0"))
    assert not (tmp_path / "node1").exists()


# The worker threads of gloo get no time until the processes end: they still hold tensors then.
STARVED = """
import os, sys
import torch.distributed
sys.path.insert(0, sys.argv[1])
from rwkv_dpo.commands import train
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.distributed.init_process_group("gloo")
for thread in os.listdir("/proc/self/task"):
    if int(thread) != os.getpid():
        os.sched_setscheduler(int(thread), os.SCHED_IDLE, os.sched_param(0))
torch.distributed.broadcast_object_list(["something"], 0)
print("trained")
train.leave(0)
"""


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="starving a thread takes Linux")
def test_processes_end_well_while_gloo_still_holds_tensors():
    two = environment(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1")
    command = [sys.executable, "-c", STARVED, str(TRAIN.parent / "src")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    output = finish(*(subprocess.Popen(command, env=two | {"RANK": str(rank)}, **pipes) for rank in (0, 1)))
    assert output.count("trained") == 2
