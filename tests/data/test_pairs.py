"""Pair files: both forms, the cut, and everything that is refused."""

import io
import json
import os
import pickle
import time
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.pair_files import load_pairs, save_original, save_pairs
from rwkv_dpo.data.pairs import PairSet, cut_pair, join_pairs, pack_pairs, plain_pairs
from rwkv_dpo.files.hashed import file_sha256

ROWS = [([1, 2, 3], [4], [5, 6], -1.5, -2.25), ([7], [8, 9], [8, 10], -3, -4.0)]


def packed():
    return pack_pairs([row[:3] for row in ROWS], np.array([row[3:] for row in ROWS]), {"ctx_len": 64})


def as_rows(pairs: PairSet):
    return [(*(part.tolist() for part in pairs.pair(i)), *pairs.ref_logps[i].tolist()) for i in range(len(pairs))]


def write_pickle(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def test_packed_pairs_read_back_with_their_header(tmp_path):
    save_pairs(tmp_path / "a.save", packed())
    pairs = load_pairs(tmp_path / "a.save", vocab_size=11)
    assert as_rows(pairs) == ROWS
    assert pairs.pair(1)[2].dtype == np.int32
    assert pairs.is_scored
    assert pairs.header["ctx_len"] == 64
    assert (pairs.header["version"], pairs.header["n_pairs"]) == (1, 2)


def test_equal_pairs_make_equal_bytes(tmp_path):
    for name in ("a", "b"):
        save_pairs(tmp_path / name, packed())
    assert file_sha256(tmp_path / "a") == file_sha256(tmp_path / "b")


@pytest.mark.parametrize("protocol", range(6))
def test_the_originals_pickle_reads(tmp_path, protocol):
    pairs = load_pairs(write_pickle(tmp_path / "a.save", ROWS, protocol))
    assert as_rows(pairs) == ROWS
    assert pairs.header == {}


def test_the_originals_form_is_written_as_plain_numbers(tmp_path):
    save_original(tmp_path / "a.save", packed())
    assert torch.load(tmp_path / "a.save", weights_only=True) == ROWS
    assert as_rows(load_pairs(tmp_path / "a.save")) == ROWS


@pytest.mark.parametrize("dtype", ["<f4", ">f8", "<i8"])
def test_numpy_numbers_in_a_pickle_read(tmp_path, dtype):
    number = np.dtype(dtype).type
    rows = [([np.int64(1), np.int64(2)], [3], [np.uint16(4)], number(-5), np.array([-6], dtype)[0])]
    for protocol in (3, 4, 5):
        assert as_rows(load_pairs(write_pickle(tmp_path / "a.save", rows, protocol))) == [([1, 2], [3], [4], -5.0, -6.0)]


def test_no_pairs_read_back(tmp_path):
    save_pairs(tmp_path / "a.save", pack_pairs([]))
    assert len(load_pairs(tmp_path / "a.save")) == len(load_pairs(write_pickle(tmp_path / "b.save", []))) == 0


class Malice:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [(os.mkdir, ("hacked",)), (eval, ("1",)), (np.zeros, (3,)), (getattr, ("", "upper"))])
def test_a_pickle_that_carries_code_is_refused_and_not_run(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    for content in ([*ROWS, Malice(*call)], [(*ROWS[0][:4], Malice(*call))]):
        with pytest.raises(InputError, match=r"a.save: carries code \(.*\); a pair file holds only"):
            load_pairs(write_pickle(tmp_path / "a.save", content))
    assert os.listdir(tmp_path) == ["a.save"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (([1], [2], [3], -1.0), "not a 5-tuple"),
        ("abcde", "not a 5-tuple"),
        (([], [2], [3], -1.0, -1.0), "the prompt is empty"),
        (([1], [], [3], -1.0, -1.0), "the chosen answer is empty"),
        (([1], [2], [], -1.0, -1.0), "the rejected answer is empty"),
        (([1], [2, 3], [2, 3], -1.0, -1.0), "the chosen and the rejected answer are equal"),
        (([1], [2.5], [3], -1.0, -1.0), "a token is not an integer"),
        (([1], ["2"], [3], -1.0, -1.0), "a token is not an integer"),
        (([1], [None], [3], -1.0, -1.0), "a token is not an integer"),
        (([1], [[2], [3, 4]], [3], -1.0, -1.0), "its tokens are nested lists"),
        (([1], "2", [3], -1.0, -1.0), "its tokens are a str"),
        (([1], [-7], [3], -1.0, -1.0), "token -7 is negative"),
        (([1], [2**40], [3], -1.0, -1.0), "token 1099511627776 is in no vocabulary"),
        (([1], [-(2**40)], [3], -1.0, -1.0), "token -1099511627776 is in no vocabulary"),
        (([1], [2**70], [3], -1.0, -1.0), "a token is not an integer"),
        (([1], [11], [3], -1.0, -1.0), "token 11 is outside the vocabulary of 11; the pairs were made with another vocabulary"),
        (([1], [2], [3], float("inf"), -1.0), "a reference log-probability is not finite"),
        (([1], [2], [3], -1.0, float("nan")), "a reference log-probability is not finite"),
        (([1], [2], [3], "-1", -1.0), "its reference log-probability is a str"),
        (([1], [2], [3], None, -1.0), "its reference log-probability is a NoneType"),
    ],
)
def test_a_bad_row_is_refused_by_number(tmp_path, row, message):
    with pytest.raises(InputError, match=f"a.save: row 3: {message}"):
        load_pairs(write_pickle(tmp_path / "a.save", [*ROWS, row, ROWS[0]]), vocab_size=11)


@pytest.mark.parametrize("n_before", [0, 1, 2])
def test_equal_answers_are_refused_by_the_number_of_their_row(tmp_path, n_before):
    rows = [*[ROWS[0][:3]] * n_before, ([1], [3], [3]), ROWS[1][:3]]
    save_pairs(tmp_path / "a.save", pack_pairs(rows, np.full((len(rows), 2), -1.0)))
    with pytest.raises(InputError, match=f"row {n_before + 1}: the chosen and the rejected answer are equal"):
        load_pairs(tmp_path / "a.save")


def test_packed_rows_are_checked_like_pickled_ones(tmp_path):
    for row, message in [
        (([1], [], [3]), "row 3: the chosen answer is empty"),
        (([1], [3], [3]), "row 3: the chosen and the rejected answer are equal"),
        (([1], [-3], [3]), "row 3: token -3 is negative"),
        (([1], [3], [99]), "row 3: token 99 is outside the vocabulary of 50"),
    ]:
        save_pairs(tmp_path / "a.save", pack_pairs([*(r[:3] for r in ROWS), row], np.full((3, 2), -1.0)))
        with pytest.raises(InputError, match=message):
            load_pairs(tmp_path / "a.save", vocab_size=50)


def test_pairs_are_unscored_all_together_or_not_at_all(tmp_path):
    unscored = pack_pairs([row[:3] for row in ROWS])
    save_pairs(tmp_path / "a.save", unscored)
    assert not load_pairs(tmp_path / "a.save").is_scored
    with pytest.raises(InputError, match=r"b.save: the original's form needs reference log-probabilities"):
        save_original(tmp_path / "b.save", unscored)
    half_scored = pack_pairs([row[:3] for row in ROWS], np.array([[-1.0, -2.0], [np.nan, np.nan]]))
    save_pairs(tmp_path / "a.save", half_scored)
    with pytest.raises(InputError, match=r"row 2: a reference log-probability is not finite"):
        load_pairs(tmp_path / "a.save")


def test_scores_attach_with_the_fingerprint_of_their_model():
    scored = pack_pairs([row[:3] for row in ROWS]).with_ref_logps(np.array([[-1, -2], [-3, -4]]), "abc", "bf16")
    assert scored.ref_logps.tolist() == [[-1.0, -2.0], [-3.0, -4.0]]
    assert (scored.header["reference_sha256"], scored.header["reference_precision"]) == ("abc", "bf16")
    for nans in ([[1.0, np.nan], [1, 1]], [[np.nan] * 2] * 2):
        with pytest.raises(InputError, match="reference scoring"):
            scored.with_ref_logps(np.array(nans), "abc", "fp16")


def test_select_keeps_rows_in_the_given_order():
    assert as_rows(packed().select([1, 0, 1])) == [ROWS[1], ROWS[0], ROWS[1]]
    assert len(packed().select([])) == 0


def test_joined_sets_hold_the_pairs_of_each_one_after_the_other():
    assert as_rows(join_pairs([packed(), pack_pairs([]), packed().select([1])])) == [*ROWS, ROWS[1]]
    assert join_pairs([packed()]).header == {}


NOT_PAIRS = {
    "empty": b"",
    "html": b"<!DOCTYPE html>",
    "zip start": b"PK\x03\x04",
    "dict": pickle.dumps({"a": 1}),
    "torn pickle": pickle.dumps(ROWS)[:-5],
    "shorter pickle": pickle.dumps(ROWS)[:3],
    "torn string": b"\x80\x05\x8c\xff",
}


@pytest.mark.parametrize("content", NOT_PAIRS.values(), ids=NOT_PAIRS.keys())
def test_a_file_that_is_no_pair_file_is_refused(tmp_path, content):
    (tmp_path / "a.save").write_bytes(content)
    with pytest.raises(InputError, match=r"a.save: not (a|pairs)"):
        load_pairs(tmp_path / "a.save")
    with pytest.raises(InputError, match=r"b.save: no such pair file"):
        load_pairs(tmp_path / "b.save")


@pytest.mark.parametrize("n_lost", [1, 100, 500])
def test_a_torn_packed_file_is_refused(tmp_path, n_lost):
    save_pairs(tmp_path / "a.save", packed())
    (tmp_path / "a.save").write_bytes((tmp_path / "a.save").read_bytes()[:-n_lost])
    with pytest.raises(InputError, match=r"a.save: not an intact pair file"):
        load_pairs(tmp_path / "a.save")


def test_a_flipped_byte_in_the_tokens_is_noticed(tmp_path):
    save_pairs(tmp_path / "a.save", packed())
    content = (tmp_path / "a.save").read_bytes()
    place = content.index(packed().tokens.tobytes())
    (tmp_path / "a.save").write_bytes(content[:place] + b"\x7f" + content[place + 1 :])
    with pytest.raises(InputError, match=r"a.save: not an intact pair file"):
        load_pairs(tmp_path / "a.save")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.array([0, 3, 4, 6, 7, 9, 12])}, "its arrays disagree"),
        ({"offsets": np.array([0, 4, 3, 6, 7, 9, 11])}, "its arrays disagree"),
        ({"offsets": np.zeros(0, np.int64)}, "its arrays disagree"),
        ({"offsets": np.int64(3)}, "its arrays disagree"),
        ({"ref_logps": np.zeros((3, 2))}, "its arrays disagree"),
        ({"tokens": np.zeros(11)}, "its arrays disagree"),
        ({"tokens": packed().tokens[:, None]}, "its arrays disagree"),
        ({"offsets": np.array([0, 3, 4, 6, 7, 11])}, "its arrays disagree"),
        ({"tokens": np.array([{}] * 11)}, "not an intact pair file"),
        ({"header": {"format": "another"}}, "its header does not say 'rwkv_dpo pairs'"),
        ({"header": []}, "its header does not say"),
        ({"header": {"format": "rwkv_dpo pairs", "version": 3}}, "pair format version 3; versions 1 and 2 are known"),
    ],
)
def test_arrays_that_disagree_are_refused(tmp_path, change, message):
    pairs = packed()
    arrays = {
        "header": {"format": "rwkv_dpo pairs", "version": 1},
        "tokens": pairs.tokens, "offsets": pairs.offsets, "ref_logps": pairs.ref_logps,
    } | change  # fmt: skip
    arrays["header"] = np.frombuffer(json.dumps(arrays["header"]).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(content, **arrays)
    (tmp_path / "a.save").write_bytes(content.getvalue())
    with pytest.raises(InputError, match=f"a.save: .*{message}"):
        load_pairs(tmp_path / "a.save")


@pytest.mark.parametrize("version", [(0, 9), (2, 0)])
def test_arrays_of_another_version_of_numpys_form_are_refused(tmp_path, version):
    save_pairs(tmp_path / "a.save", packed())
    with zipfile.ZipFile(tmp_path / "a.save") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "b.save", "w") as archive:
        for name, content in members.items():
            assert content.startswith(b"\x93NUMPY\x01\x00")
            archive.writestr(name, content[:6] + bytes(version) + content[8:] if name == "tokens.npy" else content)
    with pytest.raises(InputError, match=r"b\.save: not an intact pair file: its tokens are not of \.npy version 1\.0"):
        load_pairs(tmp_path / "b.save")


def test_62000_packed_pairs_load_in_a_second(tmp_path):
    lengths = np.random.default_rng(0).integers(5, 60, (62_000, 3))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1], dtype=np.int32) % 65_000
    save_pairs(tmp_path / "a.save", plain_pairs(tokens, offsets, np.full((62_000, 2), -1.0)))
    # The best of three: other work on the machine only ever adds time.
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        load_pairs(tmp_path / "a.save", vocab_size=65_536)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


@given(sizes=st.tuples(*[st.integers(1, 40)] * 3), ctx_len=st.integers(2, 50))
def test_a_cut_pair_fits_and_loses_no_more_than_it_must(sizes, ctx_len):
    prompt, chosen, rejected = (np.arange(size) + 100 * i for i, size in enumerate(sizes))
    cut_prompt, cut_chosen, cut_rejected, *n_cut = cut_pair(prompt, chosen, rejected, ctx_len)

    assert len(cut_prompt) + max(len(cut_chosen), len(cut_rejected)) <= ctx_len
    assert min(map(len, (cut_prompt, cut_chosen, cut_rejected))) >= 1
    assert n_cut == [len(prompt) - len(cut_prompt), len(chosen) - len(cut_chosen), len(rejected) - len(cut_rejected)]
    assert cut_prompt.tolist() == prompt.tolist()[n_cut[0] :]
    assert cut_chosen.tolist() == chosen.tolist()[: len(cut_chosen)]
    assert cut_rejected.tolist() == rejected.tolist()[: len(cut_rejected)]
    assert len(cut_prompt) >= min(len(prompt), ctx_len // 2)
    if any(n_cut):
        assert len(cut_prompt) + max(len(cut_chosen), len(cut_rejected)) == ctx_len
    if n_cut[1] or n_cut[2]:
        assert len(cut_prompt) == min(len(prompt), ctx_len // 2)


def test_the_cut_worked_out_by_hand():
    def sizes(*arguments):
        *rows, ctx_len = arguments
        cut = cut_pair(*(np.arange(n) for n in rows), ctx_len)
        return tuple(map(len, cut[:3])), cut[3:]

    assert sizes(10, 5, 6, 16) == ((10, 5, 6), (0, 0, 0))
    assert sizes(10, 5, 6, 15) == ((9, 5, 6), (1, 0, 0))
    assert sizes(10, 5, 9, 12) == ((6, 5, 6), (4, 0, 3))
    assert sizes(3, 20, 30, 12) == ((3, 9, 9), (0, 11, 21))


def test_offsets_that_wrap_around_are_refused(tmp_path):
    """Their differences, as int64, are all positive."""
    low, top = -(2**63), 2**63 - 1
    offsets = np.array([0, top, low, -1, 2, 3, 4])
    assert (np.diff(offsets) >= 0).all()
    save_pairs(tmp_path / "a.save", plain_pairs(np.arange(4, dtype=np.int32), offsets, np.full((2, 2), -1.0)))
    with pytest.raises(InputError, match="its arrays disagree"):
        load_pairs(tmp_path / "a.save")


def test_a_pickle_leaves_the_reader_as_it_was(tmp_path):
    """BUILD with a pair of states sets attributes on whatever is on the stack, a class of the reader's too."""
    scalar = b"cnumpy.core.multiarray\nscalar\n"
    (tmp_path / "a.save").write_bytes(b"\x80\x02]" + scalar + b"N(X\x0c\0\0\0__defaults__)t\x86ba.")
    with pytest.raises(InputError, match=r"a\.save"):
        load_pairs(tmp_path / "a.save")
    rows = [([1], [2], [3], np.float32(-1), -1.0)]
    assert len(load_pairs(write_pickle(tmp_path / "b.save", rows))) == 1


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"])
def test_a_name_that_the_system_does_not_take_is_no_such_file(tmp_path, name):
    with pytest.raises(InputError, match="no such pair file"):
        load_pairs(tmp_path / name)


def test_lists_may_be_shared_between_rows(tmp_path):
    prompt = list(range(200))
    rows = [(prompt, [i], [i + 1], -1.0, -1.0) for i in range(20)]
    assert as_rows(load_pairs(write_pickle(tmp_path / "a.save", rows))) == rows
