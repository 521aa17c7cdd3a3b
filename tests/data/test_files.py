"""Files of rows: every form, every coding, every way a file can be broken, and never more of it in memory than needed."""

import csv
import gzip
import io
import json
import tracemalloc
from unittest import mock

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data import text_files
from rwkv_dpo.data.files import expand, open_rows, text_field
from rwkv_dpo.data.text_files import ROW_ENDINGS, ending, open_lines, read_text

# Line separators other than "\n", quotes, a comma, an empty text, and one longer than csv's usual limit.
ROWS = [{"text": "a\u2028b\x85c", "n": '"1", 2\r\n3'}, {"text": "", "n": "é三🎉"}, {"text": "x" * 200_000, "n": " "}]


def encoded(rows, kind) -> bytes:
    if kind == ".json":
        return json.dumps(rows, ensure_ascii=False, indent=1).encode()
    if kind in (".jsonl", ".ndjson"):
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    if kind in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0], dialect="excel" if kind == ".csv" else "excel-tab")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    content = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    if kind == ".parquet":
        parquet.write_table(table, content)
    else:
        with pa.ipc.new_stream(content, table.schema) as stream:
            stream.write_table(table, max_chunksize=100)
    return content.getvalue()


@pytest.mark.parametrize("kind", ROW_ENDINGS)
@pytest.mark.parametrize("wrap", ["plain", "gz", "byte order mark"])
def test_every_form_gives_the_same_rows(tmp_path, kind, wrap):
    content = encoded(ROWS, kind)
    if wrap == "byte order mark" and kind not in (".parquet", ".arrow"):
        content = b"\xef\xbb\xbf" + content
    path = tmp_path / (f"a{kind}.gz" if wrap == "gz" else f"a{kind.upper()}")
    path.write_bytes(gzip.compress(content) if wrap == "gz" else content)
    named = list(open_rows(path))
    assert [row for _, row in named] == ROWS
    assert [where for where, _ in named] == [f"{'line' if kind in ('.jsonl', '.ndjson') else 'row'} {i}" for i in (1, 2, 3)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=4), max_size=5),
    block=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 3]),
    escaped=st.booleans(),
)
def test_an_array_read_in_blocks_of_any_size_is_what_json_reads_whole(tmp_path_factory, rows, block, indent, escaped):
    path = tmp_path_factory.getbasetemp() / "blocks.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=escaped), "utf-8", newline="")
    with mock.patch.object(text_files, "BLOCK", block):
        assert [row for _, row in open_rows(path)] == json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("kind", ROW_ENDINGS)
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    rows = [{"text": f"{i} " * 500} for i in range(4000)]
    (tmp_path / f"a{kind}").write_bytes(encoded(rows, kind))
    n_characters = sum(len(row["text"]) for row in rows)
    next(open_rows(tmp_path / f"a{kind}"))
    tracemalloc.start()
    assert sum(len(row["text"]) for _, row in open_rows(tmp_path / f"a{kind}")) == n_characters
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Two blocks of 1 MB and the text made of them, or 256 rows of a batch, against 9.4 MB in the file.
    assert peak < 0.45 * n_characters


def test_rows_come_before_a_fault_further_down(tmp_path):
    for name, content in (("a.jsonl", '{"a": 1}\n{'), ("a.json", '[{"a": 1}, {'), ("a.csv", 'a\n1\n"2')):
        (tmp_path / name).write_text(content)
        rows = open_rows(tmp_path / name)
        assert str(next(rows)[1]["a"]) == "1"
        with pytest.raises(InputError, match=r"(line|row) 2: not (JSON|CSV)"):
            next(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", r"is empty; expected an array of rows, or objects"),
        ("a.json", b"7", r"begins with '7'; expected an array of rows, or objects"),
        ("a.json", b"[", r"row 1: not JSON: Expecting value"),
        ("a.json", b'[{"a": 1} {"a": 2}]', r"row 1: not JSON: '\{' follows it; expected ',' or '\]'"),
        ("a.json", b'[{"a": 1}', r"row 1: not JSON: 'the end of the file' follows it"),
        ("a.json", b'[{"a": 1},\n\n]', r"row 2: not JSON: a comma before '\]' at line 3"),
        ("a.json", b'[{"a": 1},\n{"a": [1,\n]}]', r"row 2: not JSON: a comma before '\]' at line 3"),
        ("a.json", b'{"data": [{"a": 1}],\n}', r"row 1: not JSON: '\}' follows it; expected '\"' at line 2"),
        ("a.json", b'{\n"data": [{"a": 1}]}{"a": 1}', r"not JSON: '\{' follows the object that holds all rows at line 2"),
        ("a.json", b'{"examples": [{"a": 1}], "prompt": "p"}', r"rows in 'examples', and 'prompt' beside them"),
        ("a.json", b"[] []", r"not JSON: '\[' follows the array"),
        ("a.json", b"[[1]]", r"row 1: is a list; expected an object with named fields"),
        ("a.json", b"[" * 100_000, r"row 1: not JSON: maximum recursion"),
        ("a.json", '[{"a": "é"}]'.encode("latin-1"), r"not UTF-8: invalid continuation byte at byte 8"),
        ("a.json", '["é"'.encode("utf-16")[:-1], r"not UTF-16-LE: truncated data at byte 8"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', r"line 3: not JSON: Expecting value"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1,}\n', r"line 2: not JSON: a comma before '\}'"),
        ("a.jsonl", b"1", r"line 1: is a int; expected an object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}', r"line 2: not UTF-8: invalid start byte at its byte 7"),
        ("a.jsonl", b"9" * 5000, r"line 1: not JSON: Exceeds the limit|line 1: is a int"),
        ("a.csv", b"", r"line 1: expected the names of the fields, each once, found none"),
        ("a.csv", b"a,a\n1,2", r"line 1: expected the names of the fields, each once, found 'a', 'a'"),
        ("a.csv", b"a,b\n1,'\n2'\n1,2,3\n", r"row 2: 1 fields; the first line names 2 \(parted by ','; line 3\)"),
        ("a.csv", b'a,b\n1,2\n"1,2\n', r"row 2: not CSV: unexpected end of data"),
        ("a.csv", b"a\n\xff\n", r"line 2: not UTF-8"),
        ("a.parquet", b"PAR1", r"not an intact .parquet file, after row 0"),
        ("a.jsonl.gz", b"\x1f\x8b" + b"no" * 9, r"cannot be read: Unknown compression method|not an intact .gz file: Unknown compression"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], r"not an intact .gz file|cannot be read"),
        ("a.txt", b"text", r"rows are read from .json, .jsonl, .ndjson, .parquet, .arrow, .csv, .tsv files, also compressed"),
    ],
)
def test_a_broken_file_is_named_with_the_row_and_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: ({message})") as fault:
        list(open_rows(tmp_path / name))
    assert "\n" not in str(fault.value)


def test_a_parquet_file_cut_anywhere_is_an_input_error(tmp_path):
    content = encoded(ROWS, ".parquet")
    for n in range(0, len(content), len(content) // 23):
        (tmp_path / "a.parquet").write_bytes(content[:n])
        with pytest.raises(InputError, match=r"a.parquet: (not an intact .parquet file|cannot be read)"):
            list(open_rows(tmp_path / "a.parquet"))


def test_a_faulty_row_can_be_left_out_and_the_rest_comes(tmp_path):
    cases = {
        "a.jsonl": (b'{"a": 1}\n{"a\n{"a": "\xff"}\n[]\n{"a": 2}', ["line 2: not JSON", "line 3: not UTF-8", "line 4: is a list"]),
        "a.csv": (b"a\n1\n1,1\n2\n", ["row 2: 2 fields"]),
        "a.json": (b'[{"a": 1}, 7, {"a": 2}]', ["row 2: is a int"]),
    }
    for name, (content, messages) in cases.items():
        (tmp_path / name).write_bytes(content)
        faults: list[InputError] = []
        assert [str(row["a"]) for _, row in open_rows(tmp_path / name, faults.append)] == ["1", "2"]
        assert len(faults) == len(messages)
        assert all(f"{name}: {message}" in str(fault) for fault, message in zip(faults, messages, strict=True))


def test_names_find_files_folders_and_globs_in_order(tmp_path):
    names = ["b.jsonl", "a.json.gz", "deep/er/c.CSV", "deep/d[1].jsonl", ".hidden.jsonl", "notes.txt", "deep/picture.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def found(pattern, **options):
        return [path.relative_to(tmp_path).as_posix() for path in expand(f"{tmp_path}/{pattern}", **options)]

    assert found("b.jsonl") == ["b.jsonl"]
    assert found("") == ["a.json.gz", "b.jsonl", "deep/d[1].jsonl", "deep/er/c.CSV"]
    assert found("", endings=(".txt",)) == ["notes.txt"]
    assert found("*.json*") == ["a.json.gz", "b.jsonl"]
    assert found("**/*.jsonl") == ["b.jsonl", "deep/d[1].jsonl"]
    assert found("deep/d[1].jsonl") == ["deep/d[1].jsonl"]
    for pattern, message in (("e*", "matches no file"), ("none", "cannot be read: No such file or directory")):
        with pytest.raises(InputError, match=message):
            found(pattern)
    with pytest.raises(InputError, match=r"deep: no .txt file in this folder"):
        found("deep", endings=(".txt",))


def test_endings_look_past_gz_and_capitals():
    assert [ending(name) for name in ("a.TXT", "b/a.jsonl.GZ", "a.b.csv", "a", "a.gz")] == [".txt", ".jsonl", ".csv", "", ""]


def test_text_is_read_whole_or_by_lines(tmp_path):
    content = "\ufeffone\r\ntwo\u2028\n\nthree é"
    for name, data in (("a.txt", content.encode()), ("a.txt.gz", gzip.compress(content.encode()))):
        (tmp_path / name).write_bytes(data)
        assert [text for _, text in open_lines(tmp_path / name)] == ["one\r\n", "two\u2028\n", "\n", "three é"]
        for block in (1, 2, 1000):
            with mock.patch.object(text_files, "BLOCK", block):
                assert read_text(tmp_path / name) == "one\ntwo\u2028\n\nthree é"
    (tmp_path / "a.txt").write_bytes(b"abc\xc3")
    with mock.patch.object(text_files, "BLOCK", 2), pytest.raises(InputError, match=r"not UTF-8: unexpected end of data at byte 3"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"none.txt: cannot be read: No such file"):
        read_text(tmp_path / "none.txt")


def test_a_field_that_is_not_text_is_named():
    assert text_field({"a": "é"}, "a", "here") == "é"
    for row, message in (
        ({"b": 1}, r"here: no field 'a', found 'b'"),
        ({}, r"here: no field 'a', found none"),
        ({"a": None}, r"here: field 'a' is a NoneType; expected text"),
        ({"a": "xy\ud800"}, r"here: field 'a' has a lone surrogate at character 2"),
    ):
        with pytest.raises(InputError, match=message):
            text_field(row, "a", "here")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_what_a_failed_download_left_is_refused_by_what_it_is(tmp_path, name):
    contents = {
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n": "but a Git LFS pointer, .*; git lfs pull fetches",
        "<!DOCTYPE html>\n<html><head>": "but a web page",
    }
    for content, message in contents.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=rf"{name}: not a \.\w+ file {message}"):
            list(open_rows(tmp_path / name))


def test_a_text_that_is_a_web_page_is_a_text(tmp_path):
    (tmp_path / "a.txt").write_text("<html>Hi</html>")
    assert read_text(tmp_path / "a.txt") == "<html>Hi</html>"
    (tmp_path / "a.txt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match="a Git LFS pointer"):
        read_text(tmp_path / "a.txt")
