"""The three files of a preparation: one id, written as one, and not over another's."""

import json
import os
from functools import partial

import numpy as np
import pytest
from recording_os import RecordingOS
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.pair_files import load_pairs, write_as_original, write_packed
from rwkv_dpo.data.preference import Preference
from rwkv_dpo.data.prepare import prepare
from rwkv_dpo.data.splits import identified, is_prepared, split_rows, write_splits
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.files import atomic
from rwkv_dpo.files.hashed import file_sha256

TOKENIZER = WorldTokenizer()
FORMS = {"packed": write_packed, "original": write_as_original}
IN_ORDER = ["trainset.save", "validset.save", "testset.save", "report.html", "report.json"]


def prepared(reference, seed=0, n=30, precision="fp32", ctx_len=64):
    """Pairs as they are before scoring, with their id, and the rows of each split."""
    rows = [Preference(f"row {i}", "", (f"Question {i}?",), f"Answer {i}.", f"No {i}.") for i in range(n)]
    made = prepare(rows, TOKENIZER, ctx_len, "mix", seed)
    splits = split_rows(made.prompt_keys, 0.2, 0.3, seed)
    return identified(made.pairs, splits, reference, precision), splits


def write(folder, pairs, rows, form="packed"):
    scored = pairs.with_ref_logps(np.full((len(pairs), 2), -1.5), pairs.header["reference_sha256"], pairs.header["reference_precision"])
    return write_splits(folder, scored, rows, {"lengths": {}}, str, FORMS[form])


@pytest.fixture
def reference(tmp_path):
    (tmp_path / "base.pth").write_bytes(b"weights")
    (tmp_path / "pairs").mkdir()
    return tmp_path / "base.pth"


def test_all_files_carry_one_id_and_equal_settings_make_equal_bytes(tmp_path, reference):
    (tmp_path / "again").mkdir()
    files = write(tmp_path / "pairs", *prepared(reference))
    assert files == write(tmp_path / "again", *prepared(reference))
    assert sorted(os.listdir(tmp_path / "pairs")) == sorted(IN_ORDER)
    for name in IN_ORDER:
        assert (tmp_path / "pairs" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    report = json.loads((tmp_path / "pairs" / "report.json").read_text())
    assert report["files"] == files
    sets = [load_pairs(tmp_path / "pairs" / name) for name in files]
    assert {one.header["preparation_id"] for one in sets} == {report["pairs"]["preparation_id"]}
    assert [entry["pairs"] for entry in files.values()] == [len(one) for one in sets]
    assert [entry["sha256"] for entry in files.values()] == [file_sha256(tmp_path / "pairs" / name) for name in files]


def test_the_id_tells_preparations_apart_and_the_source_does_not(tmp_path, reference):
    header = prepared(reference)[0].header
    (tmp_path / "other.pth").write_bytes(b"other weights")
    others = [prepared(reference, **changed) for changed in ({"seed": 1}, {"precision": "bf16"}, {"ctx_len": 32})]
    others.append(prepared(tmp_path / "other.pth"))
    ids = {header["preparation_id"], *(pairs.header["preparation_id"] for pairs, _ in others)}
    assert len(ids) == 5
    assert {pairs.header["source_id"] for pairs, _ in others} == {header["source_id"]}
    assert prepared(reference, n=29)[0].header["source_id"] != header["source_id"]


@pytest.mark.parametrize("form", FORMS)
def test_only_what_these_settings_made_is_gone_over(tmp_path, reference, form):
    folder, is_packed = tmp_path / "pairs", form == "packed"
    pairs, rows = prepared(reference)
    assert not is_prepared(folder, pairs, rows, is_packed)
    write(folder, pairs, rows, form)
    assert is_prepared(folder, pairs, rows, is_packed)
    # Killed before its end, as far as that shows.
    for name in ("report.json", "testset.save"):
        (folder / name).unlink()
        assert not is_prepared(folder, pairs, rows, is_packed)
    write(folder, pairs, rows, form)
    (tmp_path / "other.pth").write_bytes(b"other weights")
    message = r"pairs holds pair files that these settings don't make \(trainset.save, validset.save, testset.save\): --overwrite 1"
    for others in (prepared(reference, seed=1), prepared(tmp_path / "other.pth")):
        with pytest.raises(InputError, match=message):
            is_prepared(folder, *others, is_packed)
    with pytest.raises(InputError, match=message):
        is_prepared(folder, pairs, rows, not is_packed)


def test_a_file_that_is_no_pair_file_is_not_gone_over(tmp_path, reference):
    (tmp_path / "pairs" / "validset.save").write_text("my notes")
    with pytest.raises(InputError, match=r"don't make \(validset.save\)"):
        is_prepared(tmp_path / "pairs", *prepared(reference), is_packed=True)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("n", range(6))
def test_a_kill_between_the_names_never_leaves_files_of_two_preparations(tmp_path, reference, monkeypatch, n):
    folder = tmp_path / "pairs"
    write(folder, *prepared(reference))
    new, rows = prepared(reference, seed=1)
    renames = 0

    def replace(old, name):
        nonlocal renames
        if renames == n:
            raise Killed
        renames += 1
        os.rename(old, name)

    monkeypatch.setattr(atomic.os, "replace", replace)
    with pytest.raises(Killed) if n < 5 else monkeypatch.context():
        write(folder, new, rows)
    there = sorted(path.name for path in folder.iterdir())
    assert there == sorted(IN_ORDER[:n])
    assert {load_pairs(folder / name).header["preparation_id"] for name in IN_ORDER[: min(n, 3)]} <= {new.header["preparation_id"]}
    assert is_prepared(folder, new, rows, is_packed=True) == (n == 5)


def test_a_failure_before_the_names_leaves_the_old_files(tmp_path, reference):
    write(folder := tmp_path / "pairs", *prepared(reference))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pairs, rows = prepared(reference, seed=1)

    def fail(pairs, file, part):
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"pairs/trainset.save: cannot be written: No space left"):
        write_splits(folder, pairs, rows, {}, str, partial(fail, pairs))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_all_is_on_the_disk_before_the_first_file_takes_its_name(tmp_path, reference, monkeypatch):
    recording = RecordingOS()
    monkeypatch.setattr(atomic, "os", recording)
    write(tmp_path / "pairs", *prepared(reference))
    events = [event[0] for event in recording.record]
    assert events[:5] == ["fsync"] * 5
    assert [event[1] for event in recording.record if event[0] == "rename"] == IN_ORDER
    sizes = [event[2] for event in recording.record[:5]]
    assert sizes == [(tmp_path / "pairs" / name).stat().st_size for name in IN_ORDER]
