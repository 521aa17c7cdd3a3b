"""--wandb with the real package, without its server: its files are read with its own protocol. Where the server would matter a stand-in
of the package takes its place, and the test says so."""

import functools
import json
import os
import socket
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
from runs import run_to
from rwkv_dpo.commands import train

flags = functools.partial(runs.flags, wandb="a project", dpo_valid_file="DATA/valid.save", epoch_save=0)


def settings_of_wandb(home, variables) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    # Of the home that it leaves it needs the compiled kernels.
    kernels = os.environ.get("TORCH_EXTENSIONS_DIR") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    os.environ.update({"HOME": str(home), "TORCH_EXTENSIONS_DIR": kernels, **variables})


def trained(lives, tmp_path, flags, **variables) -> str:
    """What a run printed that ends well."""
    log = tmp_path / "log.txt"
    runs = lives.start(flags, log, prepare=functools.partial(settings_of_wandb, tmp_path, variables))
    assert lives.end(runs, log) == [0], log.read_text()
    return log.read_text()


def offline_runs(proj_dir) -> list[tuple[str, str, list[dict]]]:
    """Id, name and history of each, in the order of their making. The files are records of LevelDB's log format, of protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    result = []
    for path in sorted((proj_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        content, at, whole, run, history = path.read_bytes(), 7, b"", None, []
        assert content[:4] == b":W&B"
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            _, size, kind = struct.unpack_from("<IHB", content, at)
            whole += content[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                record = wandb_internal_pb2.Record.FromString(whole)
                whole = b""
                run = record.run if record.WhichOneof("record_type") == "run" else run
                if record.WhichOneof("record_type") == "history":
                    items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                    history.append(items)
        result.append((run.run_id, run.display_name, history))
    return result


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_without_an_account_steps_and_held_out_figures_are_logged_offline_and_a_resumed_run_stays_one(data, tmp_path, lives):
    log = trained(lives, tmp_path, flags(data, tmp_path / "out", epoch_count=1))
    assert "wandb: no account on this machine, logging offline; `wandb sync` uploads later" in log
    trained(lives, tmp_path, flags(data, tmp_path / "out", load_model=tmp_path / "out" / "rwkv-final.pth", epoch_begin=1, epoch_count=1))
    first, second = offline_runs(tmp_path / "out")
    assert first[0] == second[0]
    assert first[1].startswith("L2 D32 ctx12 ")  # of the checkpoint, whatever the flags' defaults say
    history = first[2] + second[2]
    assert [record["_step"] for record in history] == list(range(1, 9))
    for record, expected in zip(history, lines(tmp_path / "out" / "metrics.jsonl"), strict=True):
        assert {name: record[name] for name in expected} == pytest.approx(expected)
    for record, expected in zip(history[3::4], lines(tmp_path / "out" / "valid.jsonl"), strict=True):
        assert record["eval_loss"] == pytest.approx(expected["loss_dpo"])
        for name in ("rewards/accuracies", "rewards/margins", "logps/chosen"):
            assert record[f"eval_{name}"] == pytest.approx(expected[name])


@pytest.mark.slow
def test_what_the_user_has_switched_off_stays_off(data, tmp_path, lives):
    trained(lives, tmp_path, flags(data, tmp_path / "out", epoch_count=1), WANDB_MODE="disabled")
    assert not (tmp_path / "out" / "wandb").exists()


@pytest.mark.slow
def test_a_server_out_of_reach_is_a_line_and_the_run_goes_on_offline(data, tmp_path, lives):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        server = f"http://127.0.0.1:{closed.getsockname()[1]}"
        account = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": server, "WANDB_INIT_TIMEOUT": "1", "WANDB_HTTP_TIMEOUT": "1"}
        log = trained(lives, tmp_path, flags(data, tmp_path / "out", epoch_count=1), **account)
    assert "; logging offline; `wandb sync` uploads later" in log
    assert "Traceback" not in log
    ((_, _, history),) = offline_runs(tmp_path / "out")
    assert [record["_step"] for record in history] == [1, 2, 3, 4]


class StandIn:
    """Of the package wandb with an account and a server at hand: what it is given, and where it fails."""

    def __init__(self, step=0, fails_in=()):
        self.runs, self.records, self.step, self.fails_in = [], [], step, fails_in
        self.api = SimpleNamespace(api_key="key")

    def setup(self):
        return SimpleNamespace(settings=SimpleNamespace(mode="online"))

    def login(self, prompt, verify):
        return True

    def init(self, **settings):
        self._fail("init")
        self.runs.append(settings)
        return self

    def log(self, record, step):
        self._fail("log")
        assert step >= self.step
        self.records.append(record)
        self.step = step

    def finish(self):
        self._fail("finish")

    def teardown(self):
        pass

    def _fail(self, what):
        if what in self.fails_in:
            raise OSError(f"no {what}\nwith details")


def with_stand_in(monkeypatch, **settings) -> StandIn:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    stand_in = StandIn(**settings)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    return stand_in


@pytest.mark.parametrize("what", ["init", "log", "finish"])
def test_no_fault_of_the_tracker_ends_a_run(data, tmp_path, monkeypatch, caplog, what):
    """A stand-in for the package."""
    stand_in = with_stand_in(monkeypatch, fails_in=(what,))
    train.main(flags(data, tmp_path / "out"))
    assert (tmp_path / "out" / "rwkv-final.pth").exists()
    assert f"wandb: no {what}; " in caplog.text
    assert len([line for line in caplog.text.splitlines() if "wandb: no " in line]) == (2 if what == "init" else 1)
    assert len(stand_in.runs) == (what != "init")


def test_a_resumed_run_goes_on_in_its_own_run_at_the_server_which_has_some_steps_already(data, tmp_path, monkeypatch):
    """A stand-in for the package and its server."""
    stand_in = with_stand_in(monkeypatch)
    run_to(3, flags(data, tmp_path / "out"))
    assert [record["step"] for record in stand_in.records] == [1, 2, 3]
    again = with_stand_in(monkeypatch, step=5)
    train.main(flags(data, tmp_path / "out"))
    assert [record["step"] for record in again.records if "loss" in record] == [5, 6, 7, 8]
    (first,), (second,) = stand_in.runs, again.runs
    assert first["id"] == second["id"]
    assert first["resume"] == second["resume"] == "allow"
    # One that begins anew is another.
    fresh = with_stand_in(monkeypatch)
    train.main(flags(data, tmp_path / "out", resume="none"))
    assert fresh.runs[0]["id"] != first["id"]
