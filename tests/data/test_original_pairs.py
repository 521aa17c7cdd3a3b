"""The original's pair files, as torch.save and pickle.dump write them: what torch.load makes of them is what they hold."""

import pickle
import sys
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.pair_files import load_pairs, save_original
from rwkv_dpo.data.pairs import pack_pairs

WRITERS = {
    "zip": torch.save,
    "zip, protocol 4": lambda rows, path: torch.save(rows, path, pickle_protocol=4),
    "legacy": lambda rows, path: torch.save(rows, path, _use_new_zipfile_serialization=False),
    "legacy, protocol 5": lambda rows, path: torch.save(rows, path, _use_new_zipfile_serialization=False, pickle_protocol=5),
    **{f"pickle {n}": lambda rows, path, n=n: path.write_bytes(pickle.dumps(rows, n)) for n in range(6)},
}


def written(path, rows, writer="zip"):
    WRITERS[writer](rows, path)
    return path


def plain(rows):
    """What float() and tolist() make of the rows, as the original's trainer does."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tensor with a gradient that becomes a number
        return [(*(np.ravel(part).tolist() for part in row[:3]), *map(float, row[3:])) for row in rows]


def as_rows(pairs):
    return [(*(part.tolist() for part in pairs.pair(i)), *pairs.ref_logps[i].tolist()) for i in range(len(pairs))]


def batch_rows():
    """Tokens and log-probabilities as a script has them that computed all at once: parts of shared tensors, beside whole ones."""
    tokens = torch.arange(60).reshape(5, 12) % 50
    logps = -torch.arange(1.0, 11).reshape(5, 2) / 3
    return [(tokens[i, :3], tokens[i, 3::2], tokens[:, i], logps[i, 0], logps[i, 1]) for i in range(5)]


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "rows",
    [
        [([1, 2, 300], [4], [5, 6], -1.5, -2), ([7], (8, 70000), [8], -1e-300, -4.0)],
        ([[1, 2], [4], [5, 6], -1.5, -2.25], ([7], [8, 9], [8], -3, -4.0)),
        [([1], torch.tensor([2, 9]), [3], torch.tensor(-1.25), torch.tensor(-2.5, dtype=torch.float64))],
        [([1], [2], [3], torch.tensor(-1.25, dtype=torch.bfloat16), torch.tensor([-2.5], dtype=torch.float16))],
        [([1], [2], [3], torch.tensor(-7), torch.nn.Parameter(torch.tensor(-2.0)))],
        [([1], torch.tensor([[2, 4]]), torch.tensor([3]).expand(4), torch.tensor(-1.0)[None, None], -torch.ones((), requires_grad=True))],
        [([1], [2], [3], np.float32(-1.1), np.float64(-2.2)), ([np.int64(4)], [np.uint16(5)], [6], np.float16(-1), np.int32(-7))],
        [(np.array([1, 2]), np.array([3], np.uint16), np.array([[4, 5, 6]], ">i4"), np.array(-1.5), np.array(-2, "f4"))],
        batch_rows(),
        [],
    ],
    ids=["numbers", "lists", "doubles", "halves", "integers", "shapes", "numpy scalars", "numpy arrays", "parts", "none"],
)
def test_every_form_and_kind_of_number_reads_as_torch_reads_it(tmp_path, writer, rows):
    assert as_rows(load_pairs(written(tmp_path / "a.save", rows, writer))) == plain(rows)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle 4"])
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_tokens_may_be_tensors_of_any_integer(tmp_path, writer, dtype):
    rows = [(torch.tensor([1, 100]).to(getattr(torch, dtype)), [2], torch.tensor([3]).to(getattr(torch, dtype)), -1.0, -2.0)]
    if writer == "legacy" and dtype in ("uint16", "uint32", "uint64"):
        pytest.skip("torch.save writes these into archives only")
    path = written(tmp_path / "a.save", rows, writer)
    assert as_rows(load_pairs(path)) == [([1, 100], [2], [3], -1.0, -2.0)]


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle 4"])
def test_tensors_of_a_gpu_are_read_without_one(tmp_path, monkeypatch, writer):
    # All that a file knows of the GPU is this name.
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
    path = written(tmp_path / "a.save", batch_rows(), writer)
    assert b"cuda:3" in path.read_bytes()
    assert as_rows(load_pairs(path)) == plain(batch_rows())


def test_a_file_of_a_big_endian_machine_is_read_as_torch_reads_it(tmp_path, monkeypatch):
    rows = [([1], [2], torch.tensor([3 << 24, 4 << 24], dtype=torch.int32), torch.tensor(-1.0), torch.tensor(-2.0, dtype=torch.float64))]
    monkeypatch.setattr(sys, "byteorder", "big")
    path = written(tmp_path / "a.save", rows)
    monkeypatch.undo()
    read = torch.load(path, weights_only=True)
    assert read[0][2].tolist() == [3, 4]
    assert as_rows(load_pairs(path)) == plain(read)


def test_an_archive_without_checksums_is_read(tmp_path, monkeypatch):
    torch.serialization.set_crc32_options(False)
    try:
        written(tmp_path / "a.save", batch_rows())
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "a.save") as archive:
        assert not any(member.CRC for member in archive.infolist())
    assert as_rows(load_pairs(tmp_path / "a.save")) == plain(batch_rows())


@pytest.mark.parametrize("at", ["a/data.pkl", "a/data/0"])
def test_a_changed_byte_is_noticed_where_there_are_checksums(tmp_path, at):
    path = written(tmp_path / "a.save", batch_rows())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        place = archive.read(at)
    content[content.index(place) + len(place) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.save: not a pair file, or a truncated one: {at} does not have the bytes"):
        load_pairs(path)


@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle 2", "pickle 5"])
def test_a_file_cut_anywhere_is_refused(tmp_path, writer):
    whole = written(tmp_path / "a.save", batch_rows(), writer).read_bytes()
    for n in range(0, len(whole), len(whole) // 60):
        (tmp_path / "a.save").write_bytes(whole[:n])
        with pytest.raises(InputError, match=r"a\.save: not (a|pairs)"):
            load_pairs(tmp_path / "a.save")


def test_torch_loads_what_is_written_and_equal_pairs_make_equal_bytes(tmp_path):
    rows = [([1, 2, 300], [4], [5, 6], -1.5, -2.25), ([7], [8, 70000], [8], -3.0, -4.0)]
    pairs = pack_pairs([row[:3] for row in rows], np.array([row[3:] for row in rows]))
    for name in ("trainset.save", "other.save"):
        save_original(tmp_path / name, pairs)
        loaded = torch.load(tmp_path / name, weights_only=True)
        assert loaded == rows
        assert [type(row) for row in loaded] == [tuple, tuple]
        assert as_rows(load_pairs(tmp_path / name)) == rows
    assert (tmp_path / "trainset.save").read_bytes() == (tmp_path / "other.save").read_bytes()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (([1], torch.tensor([2.5]), [3], -1.0, -1.0), "a token is not an integer"),
        (([1], torch.zeros(2, 2, dtype=torch.int64), [3], -1.0, -1.0), r"its tokens cannot be read: .* of the shape \[2, 2\]"),
        (([1], torch.zeros(0, dtype=torch.int64), [3], -1.0, -1.0), "the chosen answer is empty"),
        (([1], torch.tensor([2**40]), [3], -1.0, -1.0), "token 1099511627776 is in no vocabulary"),
        (([1], torch.tensor([2**63], dtype=torch.uint64), [3], -1.0, -1.0), "token 9223372036854775808 is in no vocabulary"),
        (([1], torch.tensor([-7]), [3], -1.0, -1.0), "token -7 is negative"),
        (([1], [2], [3], torch.zeros(2), -1.0), "its reference log-probability is a tensor or an array of 2 numbers; expected one"),
        (([1], [2], [3], torch.tensor(float("nan")), -1.0), "a reference log-probability is not finite"),
        (([1], [2], [3], np.zeros(0), -1.0), "its reference log-probability is a tensor or an array of 0 numbers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("writer", ["zip", "legacy", "pickle 4"])
def test_a_row_with_a_bad_tensor_is_refused_by_number(tmp_path, row, message, writer):
    if writer == "legacy" and isinstance(row[1], torch.Tensor) and row[1].dtype == torch.uint64:
        pytest.skip("torch.save writes these into archives only")
    good = ([1], [2], [3], -1.0, -1.0)
    with pytest.raises(InputError, match=rf"a\.save: row 2: {message}"):
        load_pairs(written(tmp_path / "a.save", [good, row, good], writer))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pairs": []}, "not a pair file but a dictionary that torch.save wrote, as checkpoints are; --load_model takes a checkpoint"),
        ([{"prompt": [1]}], "it holds dictionaries"),
        (torch.zeros(3), "not pairs: it holds a tensor"),
        ([torch.nn.Linear(2, 2)], "it holds dictionaries"),
        ([torch.device("cpu")], r"carries code \(torch\.device\)"),
        ([torch.zeros(2).to_sparse()], r"carries code \(torch\._utils\._rebuild_sparse_tensor\)"),
        ([np.array([{}], dtype=object)], "carries a numpy O8; expected numbers"),
    ],
)
@pytest.mark.parametrize("writer", ["zip", "legacy"])
def test_other_things_that_torch_saves_are_refused(tmp_path, content, message, writer):
    with pytest.raises(InputError, match=rf"a\.save: (not a pair file, or a truncated one: )?{message}"):
        load_pairs(written(tmp_path / "a.save", content, writer))


@pytest.mark.parametrize("writer", ["zip", "legacy"])
def test_pairs_with_a_tensor_for_every_score_load_in_memory_like_the_files(tmp_path, writer):
    """4,000 storages."""
    scores = (-torch.arange(1.0, 4001)).reshape(-1, 2).tolist()
    rows = [([1] * 50, [i], [i + 1], torch.tensor(a), torch.tensor(b)) for i, (a, b) in enumerate(scores)]
    path = written(tmp_path / "a.save", rows, writer)
    tracemalloc.start()
    pairs = load_pairs(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # What docs/reliability.md promises.
    assert peak < 64 * path.stat().st_size
    assert pairs.ref_logps.tolist() == scores


@pytest.mark.parametrize("writer", ["zip", "pickle 4"])
def test_rows_that_share_a_list_take_no_more_memory_than_is_promised(tmp_path, writer):
    shared = [1] * 100_000
    rows = [(shared, [i + 1], [i + 2], -1.0, -1.0) for i in range(20)]
    path = written(tmp_path / "a.save", rows, writer)
    with pytest.raises(InputError, match=r"row 1[345]: the rows so far share lists of more than 7 tokens for each byte"):
        load_pairs(path)
    path = written(tmp_path / "a.save", rows[:12], writer)
    tracemalloc.start()
    assert len(load_pairs(path)) == 12
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 * path.stat().st_size


def test_many_views_of_one_large_storage_take_the_memory_of_what_they_show(tmp_path):
    large = torch.arange(5_000_000)
    rows = [([1], large[i : i + 3], large[::2_400_000], large[i].float(), -1.0) for i in range(2000)]
    path = written(tmp_path / "a.save", rows)
    pairs = load_pairs(path)
    assert pairs.pair(1999)[1].tolist() == [1999, 2000, 2001]
    assert pairs.pair(7)[2].tolist() == [0, 2_400_000, 4_800_000]
    assert pairs.ref_logps[5].tolist() == [5.0, -1.0]
