"""binidx: Megatron's bytes, and every way a file can be broken."""

import os
import struct
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.binidx import DTYPES, read_binidx, write_binidx

ORIGINAL = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "original" / "default_text_document"


def documents(dtype=np.uint16):
    return [np.array(tokens, dtype=dtype) for tokens in ([1, 2, 3], [], [7], [5, 0])]


def test_bytes_are_those_of_the_format_description(tmp_path):
    assert write_binidx(tmp_path / "a", documents()) == (4, 6)
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<6H", 1, 2, 3, 7, 5, 0)
    header = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", 8) + struct.pack("<QQ", 4, 5)
    arrays = struct.pack("<4i", 3, 0, 1, 2) + struct.pack("<4q", 0, 6, 6, 8) + struct.pack("<5q", 0, 1, 2, 3, 4)
    assert (tmp_path / "a.idx").read_bytes() == header + arrays


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_every_dtype_reads_back(tmp_path, dtype):
    write_binidx(tmp_path / "a", documents(), dtype)
    corpus = read_binidx(tmp_path / "a")
    assert corpus.tokens.dtype == dtype
    assert [corpus.document(i).tolist() for i in range(len(corpus))] == [[1, 2, 3], [], [7], [5, 0]]


def test_no_documents_and_empty_documents_read_back(tmp_path):
    for kept in ([], [np.zeros(0, np.uint16)] * 2):
        write_binidx(tmp_path / "a", kept)
        corpus = read_binidx(tmp_path / "a")
        assert (len(corpus), len(corpus.tokens)) == (len(kept), 0)


def test_the_originals_corpus_reads_and_rewrites_to_the_same_bytes(tmp_path):
    if not ORIGINAL.with_suffix(".bin").exists():
        pytest.skip("the original's corpus lies beside the repository, in ../shared/data/original, and is not there")
    corpus = read_binidx(ORIGINAL)
    assert (len(corpus), len(corpus.tokens), corpus.tokens.dtype) == (33, 39_582, np.int32)
    write_binidx(tmp_path / "copy", (corpus.document(i) for i in range(len(corpus))), np.int32)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"copy{ending}").read_bytes() == ORIGINAL.with_suffix(ending).read_bytes()


def test_a_token_too_large_for_the_dtype_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match=r"document 2 has a token that uint16 cannot hold"):
        write_binidx(tmp_path / "a", [np.array([1]), np.array([65536])])
    assert list(tmp_path.iterdir()) == []


def test_a_crash_at_any_step_of_the_swap_leaves_an_old_a_new_or_a_refused_corpus(tmp_path):
    """Both corpora have the same number of tokens: their sizes in bytes tell nothing."""
    old, new = ([np.array(tokens) for tokens in lists] for lists in ([[1], [2, 3]], [[4, 5], [6]]))

    def meets():
        try:
            corpus = read_binidx(tmp_path / "a")
        except InputError:
            return "refused"
        return [corpus.document(i).tolist() for i in range(len(corpus))]

    met = []

    def watched(step):
        def call(path, *more, **options):
            met.append(meets())
            return step(path, *more, **options)

        return call

    write_binidx(tmp_path / "a", old)
    with mock.patch("os.unlink", watched(os.unlink)), mock.patch("os.replace", watched(os.replace)):
        write_binidx(tmp_path / "a", new)
    assert meets() == [[4, 5], [6]]
    assert all(one in ([[1], [2, 3]], "refused", [[4, 5], [6]]) for one in met)
    assert "refused" in met


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_full_disk_leaves_the_old_corpus_whole(tmp_path, monkeypatch, ending):
    write_binidx(tmp_path / "a", documents())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fsync = os.fsync

    def full(descriptor):
        if f".a.{ending}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to know which file is flushed")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"a.(bin|idx): cannot be written: No space left on device"):
        write_binidx(tmp_path / "a", [np.array([9])])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_document_longer_than_its_size_can_say_is_refused(tmp_path, monkeypatch):
    # Two thousand million tokens are not made for a test.
    monkeypatch.setattr("rwkv_dpo.data.binidx._LARGEST_SIZE", 3)
    with pytest.raises(InputError, match=r"a.bin: document 2 has 4 tokens, more than 3"):
        write_binidx(tmp_path / "a", [np.arange(3), np.arange(4)])
    assert list(tmp_path.iterdir()) == []


def edit(path: Path, at: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda idx, bin: idx.unlink(), r"a.idx: no such file"),
        (lambda idx, bin: bin.unlink(), r"a.bin: no such file"),
        (lambda idx, bin: idx.write_bytes(b""), r"a.idx: not a binidx index"),
        (lambda idx, bin: edit(idx, 0, b"TNTIDX"), r"a.idx: not a binidx index"),
        (lambda idx, bin: idx.write_bytes(idx.read_bytes()[:20]), r"a.idx: truncated: 20 bytes"),
        (lambda idx, bin: idx.write_bytes(idx.read_bytes()[:-1]), r"a.idx: 121 bytes, but its header claims 4 documents"),
        (lambda idx, bin: edit(idx, 9, b"\x02"), r"a.idx: version 2; only version 1"),
        (lambda idx, bin: edit(idx, 17, b"\x09"), r"a.idx: dtype code 9; accepted are 1 to 8"),
        (lambda idx, bin: edit(idx, 34, b"\x02"), r"a.idx: its sizes and byte offsets disagree"),
        (lambda idx, bin: edit(idx, 34, struct.pack("<i", -3)), r"a.idx: its sizes and byte offsets disagree"),
        (lambda idx, bin: bin.write_bytes(bin.read_bytes()[:-2]), r"a.bin: 10 bytes, but a.idx lists 6 uint16 tokens, 12 bytes"),
        (lambda idx, bin: bin.write_bytes(bin.read_bytes() + b"\0"), r"a.bin: 13 bytes"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path, break_it, message):
    write_binidx(tmp_path / "a", documents())
    break_it(tmp_path / "a.idx", tmp_path / "a.bin")
    with pytest.raises(InputError, match=message):
        read_binidx(tmp_path / "a")
