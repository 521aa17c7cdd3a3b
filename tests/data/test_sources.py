"""Reading preferences and documents; faults name file, row and field."""

import csv
import gzip
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.preference import Dropped, Preference
from rwkv_dpo.data.sources import read_preferences

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
    assert list(read_preferences(path)) == [
        Preference(f"{where} 1", "", ("p",), "c", "r"),
        Preference(f"{where} 2", "", ("1", "2", "3"), "c", "r"),
        Preference(f"{where} 3", "s", ("1",), "c\u2028c", "r"),
    ]
    assert len(list(read_preferences(path, limit=2))) == 2


def test_byte_order_mark_blank_lines_and_a_missing_last_newline_do_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(PLAIN).encode() + b"\r\n\n" + json.dumps(PLAIN).encode())
    assert [preference.where for preference in read_preferences(tmp_path / "a.jsonl")] == ["line 1", "line 3"]


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "dpo_zh_demo.json"])
def test_real_sharegpt_files_read_whole(name):
    if not (SHARED / name).exists():
        pytest.skip("the trial data lies beside the repository, in ../shared/data, and is not there")
    preferences = list(read_preferences(SHARED / name))
    assert len(preferences) == 300
    rows = json.loads((SHARED / name).read_text("utf-8"))
    for row, preference in zip(rows, preferences, strict=True):
        told = [turn["value"] for turn in row["conversations"]]
        assert [preference.system, *preference.turns] == (told if row["conversations"][0]["from"] == "system" else ["", *told])


def test_parquet_csv_and_packed_files_read_alike(tmp_path):
    from pyarrow import Table, parquet

    rows = [{"prompt": f"p{i}\n", "chosen": "c, \"c\"", "rejected": "r\u2028"} for i in range(3)]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(PLAIN))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    expected = [Preference(f"row {i + 1}", "", (f"p{i}\n",), "c, \"c\"", "r\u2028") for i in range(3)]
    for name in ("a.parquet", "a.csv", "a.csv.gz"):
        assert list(read_preferences(tmp_path / name)) == expected


def test_rows_of_several_files_are_told_apart(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        write(tmp_path / name, [PLAIN])
    for source in (tmp_path, tmp_path / "*.jsonl"):
        assert [preference.where for preference in read_preferences(source)] == ["a.jsonl: line 1", "b.jsonl: line 1"]


def test_malformed_rows_stop_the_reading_or_are_skipped_and_told(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(PLAIN), "{", json.dumps({"prompt": "p"}), json.dumps(PLAIN), "[]"]
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"a.jsonl: line 2: not JSON"):
        list(read_preferences(path))
    first, *skipped, last, end = read_preferences(path, on_error="skip")
    assert [first, last] == [Preference(f"line {i}", "", ("p",), "c", "r") for i in (1, 4)]
    assert [drop.reason for drop in (*skipped, end)] == ["malformed"] * 3
    for drop, fault in zip((*skipped, end), ("line 2: not JSON", "line 3: has the columns 'prompt'", "line 5: is a list"), strict=True):
        assert drop.where.startswith(f"{path}: {fault}")


def test_a_tie_is_dropped_with_its_row(tmp_path):
    path = write(tmp_path / "a.json", [PLAIN, PLAIN | {"score_chosen": 1, "score_rejected": 1}])
    assert list(read_preferences(path))[1] == Dropped("row 2", "tie")


@pytest.mark.parametrize("row", [{"prompt": "p", "chosen": "c"}, PLAIN | {"chosen": {"c": 1}}, [1]])
def test_a_bad_row_is_refused_with_its_file_and_number(tmp_path, row):
    (tmp_path / "a.json").write_text(json.dumps([PLAIN, row]))
    with pytest.raises(InputError, match=r"a.json: row 2: "):
        list(read_preferences(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.json", b'[{"prompt": "p"', r"a.json: row 1: not JSON"),
        ("a.json", b'"prompt"', r"a.json: begins with '\"'; expected an array of rows"),
        ("a.json", b'["\xff"]', r"a.json: not UTF-8: invalid start byte at byte 2"),
        ("a.txt", b"", r"a.txt: rows are read from .json, .jsonl, .ndjson, .parquet"),
        ("a.json", None, r"a.json: cannot be read: No such file"),
    ],
)
def test_a_bad_file_is_refused_with_its_place_even_when_rows_are_skipped(tmp_path, name, content, fault):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for on_error in ("stop", "skip"):
        with pytest.raises(InputError, match=fault):
            list(read_preferences(tmp_path / name, on_error=on_error))


def test_a_split_of_a_file_is_refused(tmp_path):
    for name in ("a.json", "a.jsonl", "a.csv"):
        path = tmp_path / name
        path.write_text("prompt,chosen,rejected\np,c,r\n") if name == "a.csv" else write(path, [PLAIN])
        with pytest.raises(InputError, match=rf"--split train_prefs: .*{name} has no splits"):
            list(read_preferences(path, split="train_prefs"))


def test_a_split_of_a_folder_is_the_files_that_are_named_so(tmp_path):
    for name, prompt in (("train.jsonl", "a"), ("test.jsonl", "b")):
        write(tmp_path / name, [PLAIN | {"prompt": prompt}])
    assert [one.turns for one in read_preferences(tmp_path, split="test")] == [("b",)]
    assert [one.turns for one in read_preferences(tmp_path)] == [("b",), ("a",)]
    with pytest.raises(InputError, match=r"--split dev: no file in .* is named so, found test.jsonl, train.jsonl"):
        list(read_preferences(tmp_path, split="dev"))


def hub(monkeypatch, load_dataset):
    """Puts a `datasets` in place that has no network."""
    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    module.exceptions = ModuleType("datasets.exceptions")
    module.exceptions.DatasetsError = type("DatasetsError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_hub_id_is_read_from_the_split_that_is_named(monkeypatch):
    asked = []

    def load_dataset(name, split, **_):
        asked.append((name, split))
        return iter([PLAIN, PLAIN])

    hub(monkeypatch, load_dataset)
    assert [preference.where for preference in read_preferences("owner/name", 1, "train_prefs")] == ["row 1"]
    list(read_preferences("owner/name"))
    assert asked == [("owner/name", "train_prefs"), ("owner/name", "train")]


def test_a_hub_id_without_network_is_one_clear_line(monkeypatch):
    def load_dataset(name, **_):
        raise ConnectionError("no route to the Hub\nand a second line")

    hub(monkeypatch, load_dataset)
    with pytest.raises(InputError, match=r"\Aowner/name: [^\n]* no route to the Hub\Z"):
        list(read_preferences("owner/name", on_error="skip"))
