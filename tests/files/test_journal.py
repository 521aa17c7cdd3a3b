"""A journal holds what was appended, whatever point the process died at."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recording_os import RecordingOS
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.files.journal import open_journal

FINGERPRINT = bytes(range(32))


def write(path, payloads):
    with open_journal(path, FINGERPRINT) as journal:
        for payload in payloads[len(journal.records) :]:
            journal.append(payload)
    return path.read_bytes()


@given(st.lists(st.binary(max_size=20), max_size=5), st.integers(0, 200), st.booleans())
def test_a_file_torn_anywhere_keeps_its_whole_records_and_goes_on_to_the_same_bytes(tmp_path_factory, payloads, at, is_flipped):
    path = tmp_path_factory.getbasetemp() / "torn.journal"
    path.unlink(missing_ok=True)
    whole = write(path, payloads)
    torn = whole[:at]
    if is_flipped and torn:
        torn = torn[:-1] + bytes([torn[-1] ^ 0x10])
    path.write_bytes(torn)
    with open_journal(path, FINGERPRINT) as journal:
        assert journal.records == payloads[: len(journal.records)]
        # Record i ends after 32 bytes of fingerprint and 8 + its own bytes for each.
        ends = [32 + sum(8 + len(payload) for payload in payloads[: i + 1]) for i in range(len(payloads))]
        n_good = len(torn) - is_flipped
        assert len(journal.records) == sum(end <= n_good for end in ends if n_good >= 32)
    assert write(path, payloads) == whole


def test_records_of_something_else_are_not_taken(tmp_path):
    write(tmp_path / "a.journal", [b"one"])
    with open_journal(tmp_path / "a.journal", FINGERPRINT[::-1]) as journal:
        assert journal.records == []
        journal.append(b"two")
    with open_journal(tmp_path / "a.journal", FINGERPRINT[::-1]) as journal:
        assert journal.records == [b"two"]


def test_one_process_at_a_time_holds_a_journal(tmp_path):
    with (
        open_journal(tmp_path / "a.journal", FINGERPRINT),
        pytest.raises(InputError, match=r"a.journal: another process is at work on it"),
        open_journal(tmp_path / "a.journal", FINGERPRINT),
    ):
        pass
    write(tmp_path / "a.journal", [b"free again"])


def test_a_record_is_on_the_disk_before_the_next_begins(tmp_path, monkeypatch):
    stand_in = RecordingOS()
    monkeypatch.setattr("rwkv_dpo.files.journal.os", stand_in)
    with open_journal(tmp_path / "a.journal", FINGERPRINT) as journal:
        file = (tmp_path / "a.journal").stat().st_ino
        for n in (1, 2, 3):
            journal.append(b"x" * n)
            # 32 bytes of fingerprint, then 8 and its own for each record.
            assert stand_in.record[-1] == ("fsync", file, 32 + sum(8 + m for m in range(1, n + 1)))
    assert len(stand_in.record) == 3


def test_a_folder_that_is_missing_is_named(tmp_path):
    missing = tmp_path / "none" / "a.journal"
    with pytest.raises(InputError, match=r"none/a.journal: cannot be written: No such file"), open_journal(missing, FINGERPRINT):
        pass
