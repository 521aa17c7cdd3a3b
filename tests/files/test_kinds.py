"""What files are told to be, of files that other programs wrote."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.files.kinds import Kind, kind_of, refuse_others

ROWS = [{"prompt": "Why?", "chosen": "Because.", "rejected": "No."}] * 3
WEIGHTS = {"emb.weight": torch.zeros(3, 2)}
PAIRS = [([1], [2], [3], -1.0, torch.tensor(-2.0))]


def saved(write, *arguments, **options) -> bytes:
    file = io.BytesIO()
    write(*arguments, file, **options)
    return file.getvalue()


def parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    return saved(parquet.write_table, pyarrow.Table.from_pylist(ROWS))


def safetensors() -> bytes:
    from safetensors.torch import save

    return save(WEIGHTS)


def archived(opened, add) -> bytes:
    file = io.BytesIO()
    with opened(file) as archive:
        add(archive)
    return file.getvalue()


def tar() -> bytes:
    return archived(lambda file: tarfile.open(fileobj=file, mode="w"), lambda archive: archive.add(__file__))


def lines() -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


FILES = [
    ("a.save", lambda: b"", Kind.EMPTY),
    ("a.pth", lambda: bytes(9000), Kind.ZEROS),
    # As https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md has them.
    ("a.pth", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", Kind.LFS_POINTER),
    ("a.pth", lambda: b"\n<!DOCTYPE html>\n<html class=''>", Kind.WEB_PAGE),
    ("a.pth", lambda: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", Kind.WEB_PAGE),
    ("a.save", lines, Kind.JSON_LINES),
    ("a.jsonl", lambda: json.dumps({"text": "a" * 9000}).encode() + b"\n{}", Kind.JSON_LINES),
    ("a.save", lambda: json.dumps(ROWS).encode(), Kind.JSON),
    ("a.save", lambda: b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode(), Kind.JSON),
    ("a.csv", lambda: b"prompt,chosen,rejected\na,b,c\n", Kind.CSV),
    ("a.save", parquet, Kind.PARQUET),
    ("a.jsonl", lambda: gzip.compress(lines()), Kind.GZIP),
    ("a.save", lambda: bz2.compress(lines()), Kind.PACKED),
    ("a.save", lambda: lzma.compress(lines()), Kind.PACKED),
    ("a.save", tar, Kind.PACKED),
    ("a.txt", lambda: "Ünï日".encode() * 2000, Kind.TEXT),
    ("a.txt", lambda: b"[[Wiki]] {{text}} [1] (long ago)", Kind.TEXT),
    ("a.npy", lambda: saved(lambda file: np.save(file, np.arange(3))), Kind.NUMPY),
    ("a.pth", safetensors, Kind.SAFETENSORS),
    ("a.gguf", lambda: b"GGUF\3\0\0\0", Kind.GGUF),
    ("a.zip", lambda: archived(lambda file: zipfile.ZipFile(file, "w"), lambda archive: archive.writestr("a.txt", "a")), Kind.ZIP),
    ("a.pth", lambda: saved(torch.save, WEIGHTS), Kind.TORCH_DICT),
    ("a.pth", lambda: saved(torch.save, torch.nn.Linear(2, 2).state_dict()), Kind.TORCH_DICT),
    ("a.pth", lambda: saved(torch.save, torch.nn.Linear(2, 2)), Kind.TORCH),
    ("a.pth", lambda: saved(torch.save, WEIGHTS, _use_new_zipfile_serialization=False), Kind.TORCH_DICT),
    ("a.pth", lambda: saved(torch.save, WEIGHTS, _use_new_zipfile_serialization=False, pickle_protocol=4), Kind.TORCH_DICT),
    ("a.save", lambda: saved(torch.save, PAIRS), Kind.TORCH_LIST),
    ("a.save", lambda: saved(torch.save, PAIRS, pickle_protocol=4), Kind.TORCH_LIST),
    ("a.save", lambda: saved(torch.save, PAIRS, _use_new_zipfile_serialization=False), Kind.TORCH_LIST),
    ("a.save", lambda: pickle.dumps(PAIRS), Kind.PICKLE),
    ("a.save", lambda: pickle.dumps([([1], [2], [3], -1.0, -2.0)], 0), Kind.PICKLE),
    ("a.bin", lambda: b"\x80\2\7\0\1", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "kind"), FILES)
def test_a_file_is_told_by_its_first_bytes(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content())
    assert kind_of(tmp_path / name) == kind


def test_a_corpus_is_told_by_its_index(tmp_path):
    from rwkv_dpo.data.binidx import write_binidx

    write_binidx(tmp_path / "a", [np.array([1, 2], np.uint16)])
    assert kind_of(tmp_path / "a.idx") == kind_of(tmp_path / "a.bin") == Kind.BINIDX


def test_a_packed_pair_file_is_told(tmp_path):
    from rwkv_dpo.data.pair_files import save_pairs
    from rwkv_dpo.data.pairs import pack_pairs

    save_pairs(tmp_path / "a.save", pack_pairs([([1], [2], [3])]))
    assert kind_of(tmp_path / "a.save") == Kind.PAIRS


def test_another_kind_is_refused_with_what_takes_it(tmp_path):
    path = tmp_path / "my prefs.jsonl"
    path.write_bytes(lines())
    with pytest.raises(InputError) as refusal:
        refuse_others(path, "a pair file", (Kind.PAIRS,))
    assert str(refusal.value) == (
        f"{path}: not a pair file but JSON lines; preferences become pairs by prepare_pairs.py --source '{path}' --load_model BASE.pth, "
        f"texts a corpus by make_data.py '{path}'"
    )
    refuse_others(path, "rows", (Kind.JSON_LINES,))
    path.write_bytes(b"\1\2\3")
    refuse_others(path, "a pair file", ())
    with pytest.raises(InputError, match="no file: cannot be read"):
        kind_of(tmp_path / "no file")


def test_deep_json_is_told_too(tmp_path):
    (tmp_path / "a").write_bytes(b'{"a":' * 700 + b"\n" + b"{}")
    assert kind_of(tmp_path / "a") == Kind.JSON
