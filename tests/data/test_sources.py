"""Reading preferences and documents; faults name file, row and field."""

import json
from pathlib import Path

import pytest
from rwkv_dpo.data.sources import Preference, read_documents, read_preferences
from rwkv_dpo.errors import InputError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
PLAIN = {"prompt": "p", "chosen": "c", "rejected": "r"}


def message(speaker, text):
    return {"from": speaker, "value": text}


def sharegpt(*turns, chosen=("gpt", "c"), rejected=("gpt", "r")):
    return {
        "conversations": [message(*turn) for turn in turns],
        "chosen": message(*chosen),
        "rejected": message(*rejected),
    }


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize(("name", "where"), [("a.json", "row"), ("a.jsonl", "line")])
def test_both_forms_read_from_both_kinds_of_file(tmp_path, name, where):
    rows = [
        PLAIN,
        sharegpt(("human", "1"), ("gpt", "2"), ("human", "3")),
        sharegpt(("system", "s"), ("user", "1"), chosen=("assistant", "c\u2028c")),
    ]
    path = write(tmp_path / name, rows)
    assert read_preferences(path) == [
        Preference(f"{where} 1", "", ("p",), "c", "r"),
        Preference(f"{where} 2", "", ("1", "2", "3"), "c", "r"),
        Preference(f"{where} 3", "s", ("1",), "c\u2028c", "r"),
    ]
    assert len(read_preferences(path, limit=2)) == 2


def test_byte_order_mark_blank_lines_and_a_missing_last_newline_do_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode() + b"\r\n\n" + json.dumps(PLAIN).encode())
    assert [preference.where for preference in read_preferences(tmp_path / "a.jsonl")] == ["line 1", "line 3"]


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "dpo_zh_demo.json"])
def test_real_sharegpt_files_read_whole(name):
    if not (SHARED / name).exists():
        pytest.skip("the trial data lies beside the repository, in ../shared/data, and is not there")
    preferences = read_preferences(SHARED / name)
    assert len(preferences) == 300
    rows = json.loads((SHARED / name).read_text("utf-8"))
    for row, preference in zip(rows, preferences, strict=True):
        told = [turn["value"] for turn in row["conversations"]]
        assert [preference.system, *preference.turns] == (told if row["conversations"][0]["from"] == "system" else ["", *told])


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "p", "chosen": "c"}, r"has the fields 'prompt', 'chosen'; a row has prompt, chosen and rejected"),
        ({}, r"has the fields none"),
        ([1], r"is a list; expected an object"),
        (PLAIN | {"chosen": ["c"]}, r"field 'chosen' is a list; expected text"),
        (PLAIN | {"rejected": None}, r"field 'rejected' is a NoneType"),
        (PLAIN | {"prompt": "\ud800"}, r"field 'prompt' has a lone surrogate at character 0"),
        (sharegpt(), r"field 'conversations': expected a list of messages"),
        (sharegpt(("human", "1"), ("gpt", "2")), r"field 'conversations': 2 turns; expected an odd number"),
        (sharegpt(("gpt", "1")), r"field 'conversations': turn 1: is from 'gpt'; expected the user"),
        (sharegpt(("human", "1"), ("human", "2"), ("human", "3")), r"turn 2: is from 'human'; expected the assistant"),
        (sharegpt((["human"], "1")), r"turn 1: is from \['human'\]"),
        (sharegpt(("human", 1)), r"turn 1: field 'value' is a int"),
        (sharegpt(("human", "1"), chosen=("human", "2")), r"field 'chosen': is from 'human'; expected the assistant"),
        (sharegpt(("human", "1")) | {"rejected": "r"}, r"field 'rejected': expected a message with 'from' and 'value'"),
        (sharegpt(("human", "1")) | {"conversations": "hi"}, r"field 'conversations': expected a list of messages"),
        (sharegpt(("human", "1")) | {"chosen": {"from": "gpt"}}, r"field 'chosen': no field 'value', found 'from'"),
    ],
)
def test_a_bad_row_is_refused_with_its_number_and_field(tmp_path, row, fault):
    (tmp_path / "a.json").write_text(json.dumps([PLAIN, row]))
    with pytest.raises(InputError, match=rf"a.json: row 2: .*{fault}"):
        read_preferences(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", b'{"prompt": "p"\n', r"a.jsonl: line 1: not JSON: .* column 15"),
        ("a.json", b'[{"prompt": "p"}', r"a.json: not JSON"),
        ("a.json", b'{"prompt": "p"}', r"a.json: holds a dict; expected one array"),
        ("a.json", b"[" * 100_000, r"a.json: not JSON"),
        ("a.json", b'["\xff"]', r"a.json: not UTF-8: invalid start byte at byte 2"),
        ("a.csv", b"", r"a.csv: rows are read from .json and .jsonl"),
        ("a.json", None, r"a.json: cannot be read: No such file"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path, name, content, fault):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=fault):
        read_preferences(tmp_path / name)


def test_documents_read_from_text_whole_or_parted_by_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\none\ntwo\n \n\nthree\n")
    assert list(read_documents(tmp_path / "a.txt")) == ["\none\ntwo\n \n\nthree\n"]
    assert list(read_documents(tmp_path / "a.txt", split_blank_lines=True)) == ["one\ntwo", "three"]


def test_documents_read_from_the_named_field(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "body": "b"}, {"text": "c"}])
    assert list(read_documents(path)) == ["a", "c"]
    with pytest.raises(InputError, match=r"a.jsonl: line 2: no field 'body', found 'text'"):
        list(read_documents(path, field="body"))
    with pytest.raises(InputError, match=r"a.parquet: documents are read from .jsonl and .txt"):
        list(read_documents(tmp_path / "a.parquet"))
