"""The same training on any number of processes: each run here is `train.py` launched as users launch it, on CPU processes."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from conftest import random_model
from rwkv_dpo.data.pairs import file_sha256, load_pairs, pack_pairs, save_pairs
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.objective import score_pairs

pytestmark = pytest.mark.slow
# ZeRO-3 keeps tensors of up to 100,000 numbers whole on every rank: these matrices are larger.
SHAPE = ModelShape(n_layer=2, n_embd=320, dim_att=320, dim_ffn=320, vocab_size=320, head_size=64)
TRAIN = Path(train.__file__).resolve()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, a corpus and pairs of uneven lengths, scored by the model."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    model = random_model(SHAPE, torch.float32)
    save_weights(model.state_dict(), folder / "model.pth")
    rng.integers(1, 320, 4000).astype("<u2").tofile(folder / "corpus.bin")
    pairs = pack_pairs([tuple(rng.integers(1, 320, n) for n in rng.integers(2, 30, 3)) for _ in range(50)])
    save_pairs(folder / "train.save", pairs.with_ref_logps(score_pairs(model, pairs, 100), file_sha256(folder / "model.pth"), "fp32"))
    return folder


def launch(data, proj_dir, launcher=(sys.executable,), variables=None, **changes) -> subprocess.Popen:
    values = {
        "load_model": data / "model.pth", "proj_dir": proj_dir, "data_file": data / "corpus.bin", "data_type": "uint16", "ctx_len": 12,
        "dpo_train_file": data / "train.save", "dpo_general_corpus_ratio": 0.5, "dpo_beta": 0.1, "accelerator": "cpu", "precision": "fp32",
        "epoch_steps": 20, "epoch_count": 1, "micro_bsz": 1, "lr_init": 1e-4, "lr_final": 1e-5, "weight_decay": 0.1,
        "enable_progress_bar": False, "wkv_backend": "chunked", **changes,
    }  # fmt: skip
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    # A ddp run in this process would leave its address in the environment.
    ranks = ("MASTER_", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "RANK", "GROUP_RANK", "PL_", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ranks)}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "MASTER_PORT": free_port(), **(variables or {})}
    return subprocess.Popen(
        [*launcher, str(TRAIN), *flags], cwd=data, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen) -> str:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)[-5000:]
    return "".join(outputs)


def result(proj_dir) -> tuple[list[dict], dict[str, torch.Tensor]]:
    records = [json.loads(line) for line in (proj_dir / "metrics.jsonl").read_text().splitlines()]
    return records, torch.load(proj_dir / "rwkv-final.pth", weights_only=True)


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    finish(launch(data, folder, micro_bsz=2))
    return result(folder)


def assert_same(one, many):
    (records, weights), (other_records, other_weights) = one, many
    assert [r["step"] for r in other_records] == list(range(1, 21))
    for a, b in zip(records, other_records, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"tokens_per_s", "peak_memory_gb"}:
            # Rounding that moves weights by 1e-6 shows tenfold in the norm of the gradients.
            assert b[name] == pytest.approx(a[name], rel=1e-4 if name == "grad_norm" else 1e-5, abs=1e-5), (a["step"], name)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("changes", [
    {"strategy": "ddp"}, {"strategy": "deepspeed_stage_1"}, {"strategy": "deepspeed_stage_2"}, {"strategy": "deepspeed_stage_3"},
    {"strategy": "deepspeed_stage_3", "grad_cp": 1}, {"strategy": "deepspeed_stage_3", "grad_cp": "selective"},
    {"strategy": "ddp", "chunk_ctx": 16, "grad_cp": 1},
    {"strategy": "deepspeed_stage_2", "chunk_ctx": 16},
], ids=str)  # fmt: skip
def test_two_processes_of_one_sample_train_as_one_process_of_two(data, tmp_path, one_process, changes):
    finish(launch(data, tmp_path / "out", devices=2, **changes))
    assert_same(one_process, result(tmp_path / "out"))


@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_two_processes_share_the_scoring_of_the_reference(data, tmp_path, one_process, strategy):
    output = finish(launch(data, tmp_path / "out", devices=2, strategy=strategy, dpo_ref="recompute"))
    assert output.count("scored 50 pairs with the model as training starts") == 1
    scored = load_pairs(tmp_path / "out" / "reference.save").ref_logps
    # fp32 sums of up to 30 terms; a row that both ranks, or none, had scored would be off by all of it.
    np.testing.assert_allclose(scored, load_pairs(data / "train.save").ref_logps, rtol=1e-5)
    for a, b in zip(one_process[0], result(tmp_path / "out")[0], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


@pytest.mark.parametrize(("optim", "strategy"), [
    ("adamw_bf16state", "ddp"), ("adamw_bf16state", "deepspeed_stage_2"), ("adamw_bf16state", "deepspeed_stage_3"),
    ("adamw8bit", "ddp"), ("adamw8bit", "deepspeed_stage_2"),
])  # fmt: skip
def test_small_moments_train_on_two_processes_as_fp32_ones_on_one(data, tmp_path, one_process, optim, strategy):
    finish(launch(data, tmp_path / "out", devices=2, optim=optim, strategy=strategy))
    records, _ = result(tmp_path / "out")
    for a, b in zip(one_process[0], records, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.01), a["step"]


def free_port() -> str:
    """Below the range that connections take theirs from: a port of that range may be gone before it is used."""
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return str(port)
    raise AssertionError("no free port")


def torchrun(node: int, port: str) -> dict:
    agent = ("-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node), "--nproc_per_node", "1")
    return {"launcher": (sys.executable, *agent, "--master_addr", "127.0.0.1", "--master_port", port)}


def srun(node: int, port: str) -> dict:
    """What Slurm's srun, which is not here, puts into the environment of a task; see its manual page."""
    job = {"NTASKS": 2, "NNODES": 2, "NTASKS_PER_NODE": 1, "PROCID": node, "NODEID": node, "LOCALID": 0, "JOB_ID": 1, "JOB_NAME": "train"}
    return {"variables": {**{f"SLURM_{k}": str(v) for k, v in job.items()}, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}}


@pytest.mark.parametrize("node_of", [torchrun, srun])
def test_two_nodes_train_as_one_process_and_the_first_alone_writes(data, tmp_path, one_process, node_of):
    port = free_port()
    output = finish(*(launch(data, tmp_path / f"node{i}", num_nodes=2, strategy="ddp", **node_of(i, port)) for i in range(2)))
    assert output.count("epochs 0 to 0, 20 optimizer steps of 1 x 1 x 2 samples") == 1
    assert_same(one_process, result(tmp_path / "node0"))
    assert not (tmp_path / "node1").exists()
