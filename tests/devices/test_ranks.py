"""Rank 0 alone reads the run folder; what it finds there, the other ranks are told."""

import os
import threading
from datetime import timedelta

import pytest
import runs
import torch
from conftest import random_model
from lives import free_port
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities import rank_zero_only
from runs import TINY
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.devices.ranks import Ranks
from rwkv_dpo.model.checkpoint import save_weights


def test_processes_with_folders_of_their_own_begin_end_and_are_refused_together(data, tmp_path, lives):
    """As on nodes whose disks are their own: rank 1 has no config.json, no finished run, no checkpoints."""
    log, own = tmp_path / "log.txt", [["--proj_dir", str(tmp_path / f"node{rank}")] for rank in (0, 1)]

    def statuses(**changes):
        log.unlink(missing_ok=True)
        settings = {"devices": 2, "strategy": "ddp", "micro_bsz": 1, "epoch_count": 1, **changes}
        return lives.end(lives.start(runs.flags(data, tmp_path, **settings), log, 2, own=own), log)

    assert statuses() == [0, 0], log.read_text()
    assert statuses() == [0, 0]
    assert log.read_text().count("holds the end of this run") == 1
    assert "optimizer steps" not in log.read_text()
    assert statuses(dpo_beta=0.3) == [2, 2]
    assert log.read_text().count("holds a run with other settings") == 1
    # An adapter of another base: what rank 0 finds wrong with --peft_load, the others do too.
    lives.trained(runs.flags(data, tmp_path / "lora", peft="lora", lora_r=2, epoch_count=1), log)
    save_weights(random_model(TINY, torch.float32, seed=1).state_dict(), tmp_path / "other.pth")
    other = {"load_model": tmp_path / "other.pth", "peft": "lora", "peft_load": tmp_path / "lora" / "adapter-final", "overwrite": 1}
    assert statuses(**other) == [2, 2]
    assert log.read_text().count("was trained on another base model") == 2
    assert "rank 0 ended" not in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "node1").exists()


def test_stages_take_epoch_and_weights_from_the_folder_of_rank_0(data, tmp_path, lives):
    """Stage 1 on one process; stage 3 on two, the second of which has no rwkv-init.pth: both train the weights of the first."""
    log, own = tmp_path / "log.txt", [["--proj_dir", str(tmp_path / name)] for name in ("node0", "node1")]
    stage = {
        "load_model": None, "dpo": 0, "vocab_size": 61, "n_layer": 1, "n_embd": 32, "head_size_a": 32, "ctx_len": 2, "magic_prime": 1997,
        "epoch_count": 999, "micro_bsz": 10080, "my_pile_stage": 1,
    }  # fmt: skip
    lives.trained(runs.flags(data, tmp_path / "node0", **stage), log)
    init = torch.load(tmp_path / "node0" / "rwkv-init.pth", weights_only=True)
    stage |= {"my_pile_stage": 3, "overwrite": 1, "devices": 2, "strategy": "ddp", "lr_init": 1e-9, "lr_final": 1e-9}
    assert lives.end(lives.start(runs.flags(data, tmp_path, **stage), log, 2, own=own), log) == [0, 0], log.read_text()
    trained = torch.load(tmp_path / "node0" / "rwkv-final.pth", weights_only=True)
    # Steps of 1e-9: rank 1's own initial weights, had it kept them, would have pulled the losses of its half elsewhere.
    for name, value in init.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-6)
    assert not (tmp_path / "node1").exists()


class Environment(LightningEnvironment):
    """A rank of a run whose processes are started from outside."""

    creates_processes_externally = True

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.set_global_rank(rank)
        self.set_world_size(world_size)


@pytest.fixture
def address(monkeypatch):
    # Lightning keeps the rank of the last environment for the whole process: later runs in it would be of no rank 0, and say nothing.
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("RWKV_DPO_TOLD", "")


def ask(rank, decide, answers):
    def run():
        ranks = Ranks(Environment(rank, 3))
        for question in ("first", "second"):
            try:
                answers.append((rank, question, ranks.told(question, decide)))
            except (InputError, SystemExit) as end:
                answers.append((rank, question, end))
                return

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def never():
    raise AssertionError("rank 0 alone decides")


@pytest.mark.usefixtures("address")
def test_every_rank_is_told_what_rank_0_decides_and_the_others_decide_nothing():
    answers, decisions = [], iter([{"epoch": 3}, "go"])
    threads = [ask(rank, (lambda: next(decisions)) if rank == 0 else never, answers) for rank in range(3)]
    for thread in threads:
        thread.join(60)
    assert sorted(answers, key=lambda a: a[:2]) == [(r, q, v) for r in range(3) for q, v in (("first", {"epoch": 3}), ("second", "go"))]


@pytest.mark.usefixtures("address")
def test_a_refusal_of_rank_0_ends_the_others_with_its_status_and_no_word():
    def refuse():
        raise InputError("no")

    answers = []
    threads = [ask(rank, refuse if rank == 0 else never, answers) for rank in range(3)]
    for thread in threads:
        thread.join(60)
    ends = {rank: end for rank, _, end in answers}
    assert str(ends[0]) == "no"
    assert [ends[rank].code for rank in (1, 2)] == [2, 2]


@pytest.mark.usefixtures("address")
def test_no_rank_waits_for_ever_for_one_that_never_comes(monkeypatch):
    """Rank 2 has refused a file that only its node lacks."""
    monkeypatch.setattr("rwkv_dpo.devices.ranks._PATIENCE", timedelta(seconds=2))
    answers = []
    threads = [ask(rank, (lambda: 1) if rank == 0 else never, answers) for rank in (0, 1)]
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    ends = {rank: str(end) for rank, _, end in answers if isinstance(end, InputError)}
    assert ends[0] == "rank 0 waited 0:00:02 for rank 2, which did not begin; its own output may say why"
    assert ends[1].startswith("rank 1")


@pytest.mark.usefixtures("address")
def test_processes_that_rank_0_starts_find_the_answer_in_their_environment(monkeypatch):
    class Own(Environment):
        creates_processes_externally = False

    ranks = Ranks(Own(0, 2))
    assert ranks.told("first", lambda: 7) == 7
    told = os.environ["RWKV_DPO_TOLD"]
    monkeypatch.setattr("os.getppid", os.getpid)  # a child's view
    assert Ranks(Own(1, 2)).told("first", never) == 7
    assert os.environ["RWKV_DPO_TOLD"] == told
