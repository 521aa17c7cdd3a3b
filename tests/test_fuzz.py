"""A slice of the campaign of benchmarks/fuzz_readers.py: every hostile file, and some changed ones, for every reader."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.files.pickles import scan_pickle

ROOT = Path(__file__).resolve().parents[1]
NAMES = [
    "binidx",
    "pairs_packed",
    "pairs_pickled",
    "pairs_torch",
    "checkpoint",
    "safetensors",
    "adapter",
    "states",
    "last",
    "corpus_numpy",
    "corpus_utf8",
    "corpus_utf16",
    "corpus_uint16",
    "corpus_world",
    "vocabulary",
    "preferences_json",
    "preferences_jsonl",
    "preferences_csv",
    "preferences_parquet",
    "preferences_jsonl_gz",
    "documents_json",
    "documents_jsonl",
    "documents_csv",
    "documents_parquet",
    "documents_txt",
    "documents_txt_gz",
    "templates_json",
    "templates_txt",
    "flags",
]


@pytest.mark.skipif(sys.platform != "linux", reason="the guard reads /proc and limits the address space")
def test_hostile_and_changed_inputs_are_read_or_refused_and_nothing_else(tmp_path):
    """One process, which limits its own memory, for all readers: importing torch and pyarrow once."""
    paths = os.pathsep.join(str(ROOT / part) for part in ("RWKV-v5/src", "RWKV-v5", "tests"))
    command = [sys.executable, "-W", "ignore", "-m", "fuzz.worker", *NAMES, "--runs", "15", "--folder", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in NAMES}
    assert {name: report["findings"] for name, report in reports.items() if report["findings"]} == {}
    # That valid inputs are accepted, each process sees before it begins.
    assert all(report["refused"] > 0 for report in reports.values())


def test_every_reader_is_in_the_slice():
    from fuzz.readers import READERS

    assert list(READERS) == NAMES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"]r\xf0\xff\xff\x0f.", "memo number 268435440 at byte 1"),
        (b"]p9999\n.", "memo number 9999"),
        (b"B\xff\xff\xff\x7fabc.", "BINBYTES at byte 0 is longer than what is left"),
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "FRAME at byte 0 is longer"),
        (b"cos\nsystem", "GLOBAL at byte 0 is longer"),
        (b"]K\x01", "it has no end"),
        (b"]\xff.", "opcode 255 at byte 1"),
        (b"}.", "opcode EMPTY_DICT at byte 0"),
    ],
)
def test_a_pickle_that_asks_for_more_than_it_holds_is_refused_unread(content, message):
    import pickletools

    accepted = frozenset(opcode.name for opcode in pickletools.opcodes) - {"EMPTY_DICT"}
    with pytest.raises(ValueError, match=message):
        scan_pickle(content, 0, accepted)


def test_a_scan_finds_the_end_and_the_names():
    content = b"cos\nsystem\n(K\x01M\x02\x03tR.rest"
    assert scan_pickle(content, 0, frozenset({"GLOBAL", "MARK", "BININT1", "BININT2", "TUPLE", "REDUCE", "STOP"})) == (20, {"os.system"})


def test_a_message_is_one_line_whatever_it_quotes():
    message = str(InputError("a\nb \x1b[2J \ud800" + "é" * 5000))
    assert message.startswith(r"a\nb \x1b[2J \ud800éé")
    assert len(message) < 1100
    assert message.isprintable()
    assert len(str(InputError("\udced" * 900))) < 1100
