"""Logs whose last line was cut off go on in whole lines."""

import json

import pytest
from rwkv_dpo.files.json_text import mend_last_line
from rwkv_dpo.training.halt import Halt


@pytest.mark.parametrize(("name", "before", "after"), [
    ("metrics.jsonl", b'{"step": 1}\n{"step": 2, "lo', b'{"step": 1}\n'),
    ("metrics.jsonl", b'{"step": 1}\n{"step": 2}', b'{"step": 1}\n{"step": 2}\n'),  # cut between the brace and the line end
    ("metrics.jsonl", b'{"step": 1}\n{"step": 2, "lr": 1', b'{"step": 1}\n'),
    ("metrics.jsonl", b'{"step": 1}\n12', b'{"step": 1}\n'),  # JSON, and no line of ours
    ("metrics.jsonl", b'{"step": 1}\n' + bytes(5000), b'{"step": 1}\n'),  # a journal that knows the size and not the data
    ("valid.jsonl", b'{"epo', b""),
    ("train_log.txt", b"NEW RUN 2026\n0 1.5 4.48 0.0001 20", b"NEW RUN 2026\n0 1.5 4.48 0.0001 20\n"),
    ("train_log.txt", b"NEW RUN 2026\n0 1.5" + bytes(9), b"NEW RUN 2026\n"),
    ("metrics.jsonl", b"", b""),
    ("metrics.jsonl", b'{"step": 1}\n', b'{"step": 1}\n'),
])  # fmt: skip
def test_a_last_line_is_ended_or_taken_away(tmp_path, name, before, after):
    (tmp_path / name).write_bytes(before)
    mend_last_line(tmp_path / name)
    assert (tmp_path / name).read_bytes() == after


def test_the_first_append_mends_and_later_ones_only_append(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    halt = Halt()
    halt.append(path, '{"step": 2}\n')
    halt.append(path, '{"step": ')
    halt.append(path, "3}\n")
    halt.append(tmp_path / "valid.jsonl", '{"epoch": 0}\n')
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert (tmp_path / "valid.jsonl").read_text() == '{"epoch": 0}\n'
    assert not halt.fault


def test_a_log_that_cannot_be_read_is_a_fault_that_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    halt = Halt()
    halt.append(tmp_path / "metrics.jsonl", "{}\n")
    assert "metrics.jsonl: cannot be written: " in halt.fault
