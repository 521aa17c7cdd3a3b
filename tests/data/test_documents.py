"""Documents: from every kind of source the same texts."""

import gzip
import json
import sys
from types import SimpleNamespace

import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.documents import open_documents


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text, "n": 1}) + "\n" for text in texts), "utf-8")


def test_a_text_file_is_one_document_or_what_blank_lines_part(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n \none\r\nstill one\n\n\t\ntwo\n")
    assert list(open_documents(str(path))) == ["\n \none\nstill one\n\n\t\ntwo\n"]
    assert list(open_documents(str(path), split_blank_lines=True)) == ["one\nstill one", "two"]
    path.write_bytes(b"")
    assert list(open_documents(str(path))) == list(open_documents(str(path), split_blank_lines=True)) == []


def test_a_folder_or_glob_is_its_files_one_after_the_other(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["b1", "", "b2"])
    (tmp_path / "c.csv").write_text("text,n\nc1,1\n")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a"))
    (tmp_path / "readme.md").write_text("not a document")
    assert list(open_documents(str(tmp_path))) == ["a", "b1", "b2", "c1"]
    assert list(open_documents(f"{tmp_path}/[bc].*")) == ["b1", "b2", "c1"]


def test_a_row_without_the_text_is_named_or_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": 5}\n{"body": "b"}\n{"text"\n{"text": "c"}\n')
    faults: list[InputError] = []
    assert list(open_documents(str(path), on_fault=faults.append)) == ["a", "c"]
    messages = ["line 2: field 'text' is a int", "line 3: no field 'text', found 'body'", "line 4: not JSON"]
    assert len(faults) == 3
    assert all(f"{path}: {message}" in str(fault) for message, fault in zip(messages, faults, strict=True))
    with pytest.raises(InputError, match=r"a.jsonl: line 2: field 'text' is a int; expected text"):
        list(open_documents(str(path)))
    assert list(open_documents(str(path), "body", on_fault=lambda fault: None)) == ["b"]


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "a.pdf").touch()
    with pytest.raises(InputError, match=r"a.pdf: documents are read from .txt, .json, .*, .tsv files, also compressed"):
        list(open_documents(str(tmp_path / "a.pdf")))


def fake_hub(monkeypatch, load_dataset):
    """A package `datasets` that answers from here; the real one needs a network."""
    exceptions = SimpleNamespace(DatasetsError=RuntimeError)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, exceptions=exceptions))


def test_a_hub_id_is_streamed(monkeypatch):
    calls = []

    def load_dataset(name, **options):
        calls.append((name, options))
        return iter([{"text": "one"}, {"text": "two"}])

    fake_hub(monkeypatch, load_dataset)
    documents = open_documents("someone/some-texts", hub_split="validation")
    assert next(documents) == "one"
    assert calls == [("someone/some-texts", {"split": "validation", "streaming": True})]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def load_dataset(name, **options):
        raise ConnectionError("no route\nto host")

    fake_hub(monkeypatch, load_dataset)
    message = r"someone/texts: no such file or folder here, and split 'train' of it cannot be read from the Hub after row 0: no route$"
    with pytest.raises(InputError, match=message):
        list(open_documents("someone/texts"))


def test_a_missing_file_is_not_looked_for_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"data/texts.jsonl.gz: cannot be read: No such file or directory"):
        list(open_documents("data/texts.jsonl.gz"))
