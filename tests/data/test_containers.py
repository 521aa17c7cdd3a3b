"""Whatever programs wrote the rows, and however they were packed, wrapped and encoded since: they are the same rows."""

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
import subprocess
import tracemalloc

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data import arrow_rows
from rwkv_dpo.data.documents import open_documents
from rwkv_dpo.data.files import expand, of_split, open_rows
from rwkv_dpo.data.parquet_pages import largest_pages
from rwkv_dpo.data.sources import read_preferences
from rwkv_dpo.data.text_files import check_encoding, read_text

ROWS = [{"prompt": "Größe; \"wie\",\nja?", "n": "三\u2028\t"}, {"prompt": "", "n": "{'a': 1}"}, {"prompt": "x,y", "n": "[1]"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def rows_of(path, **options):
    return [row for _, row in open_rows(path, **options)]


def packed(content: bytes, program: str) -> bytes:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not there")
    return subprocess.run([program, "-c"], input=content, capture_output=True, check=True).stdout


@pytest.mark.parametrize(("program", "end"), [("gzip", ".gz"), ("bzip2", ".bz2"), ("xz", ".xz"), ("zstd", ".zst")])
def test_what_programs_pack_is_unpacked_whatever_it_is_called(tmp_path, program, end):
    content = packed(LINES, program)
    table = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), table)
    named = {f"a.jsonl{end}": content, "b.jsonl": content, "c.jsonl.GZ": content, f"d.parquet{end}": packed(table.getvalue(), program)}
    for name, written in named.items():
        (tmp_path / name).write_bytes(written)
        assert rows_of(tmp_path / name) == ROWS
    (tmp_path / "plain.jsonl.gz").write_bytes(LINES)
    assert rows_of(tmp_path / "plain.jsonl.gz") == ROWS
    # Packs one after the other are one text, as the programs take them.
    (tmp_path / "twice.txt").write_bytes(packed(b"one\r\n", program) + packed(b"two", program))
    assert read_text(tmp_path / "twice.txt") == "one\ntwo"
    (tmp_path / "cut.txt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=rf"cut.txt: not an intact .{end[1:]} file: "):
        read_text(tmp_path / "cut.txt")


@pytest.mark.parametrize("end", [".gz", ".bz2", ".xz", ".zst"])
def test_a_pack_that_is_made_to_fill_a_memory_is_refused(tmp_path, end):
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    packers[".zst"] = lambda data: pa.compress(data, "zstd", asbytes=True)
    (tmp_path / "a.jsonl").write_bytes(packers[end](b"a" * (40 << 20)))
    with pytest.raises(InputError, match=r"a.jsonl: unpacks to more than 200 times its size"):
        rows_of(tmp_path / "a.jsonl")


def test_an_xz_that_asks_for_more_memory_than_any_text_needs_is_refused(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]
    (tmp_path / "a.txt").write_bytes(lzma.compress(b"text", filters=filters))
    with pytest.raises(InputError, match=r"a.txt: not an intact .xz file: Memory usage limit"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2, ensure_ascii=False),
        LINES.decode(),
        "\n\n".join(json.dumps(row, indent=4) for row in ROWS),
        "".join(map(json.dumps, ROWS)),
        json.dumps({"data": ROWS}),
        json.dumps({"version": "1.0", "about": {"by": [1, {"a": None}]}, "data": ROWS, "n": 3}, indent=1),
        '{"data": [\n' + ",\n".join(map(json.dumps, ROWS)) + "\n]}",
        json.dumps({"train": ROWS[:2], "test": ROWS[2:]}),
        json.dumps({"data": {"train_sft": ROWS[:1], "validation": ROWS[1:], "test": []}}),
        json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
        json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}, indent=0),
        json.dumps({"train": {name: [row[name] for row in ROWS] for name in ROWS[0]}}),
        json.dumps({"features": [], "rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(ROWS)]}),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
def test_json_of_every_shape_and_name_holds_the_same_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text, "utf-8", newline="")
    assert rows_of(tmp_path / name) == ROWS


def test_an_object_that_is_a_row_is_not_taken_apart(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    said = [{"from": "human", "value": "Hi"}]
    rows = [
        {"chosen": messages, "rejected": messages[:1] * 2},
        {"messages": messages},
        {"conversations": said, "data": [1, 2]},
        {"prompt": "p", "test": {"a": 1}, "items": []},
        {"prompt": "p", "output": ["better", "worse"]},
        {"data": "text"},
        {},
    ]
    for row in rows:
        for indent in (None, 1):
            (tmp_path / "a.json").write_text(json.dumps(row, indent=indent))
            assert rows_of(tmp_path / "a.json") == [row]
    (tmp_path / "a.json").write_text("\n".join(json.dumps({"data": ROWS}) for _ in range(2)))
    assert rows_of(tmp_path / "a.json") == [{"data": ROWS}] * 2


def test_a_split_of_a_file_is_read_alone_when_it_is_asked_for(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"train": ROWS[:2], "test": ROWS[2:]}))
    assert [where for where, _ in open_rows(tmp_path / "a.json")] == ["train row 1", "train row 2", "test row 1"]
    assert rows_of(tmp_path / "a.json", split="test") == ROWS[2:]
    with pytest.raises(InputError, match=r"--split dev: .*a.json has the splits train, test"):
        rows_of(tmp_path / "a.json", split="dev")


def test_a_faulty_line_is_one_faulty_line_whatever_the_file_is_called(tmp_path):
    for name in ("a.json", "a.jsonl"):
        for at in range(4):
            lines = LINES.splitlines()
            lines.insert(at, b'{"prompt": ')
            (tmp_path / name).write_bytes(b"\n".join(lines))
            faults: list[InputError] = []
            assert [row for _, row in open_rows(tmp_path / name, faults.append)] == ROWS
            assert [f"a.{name[2:]}: line {at + 1}: not JSON" in str(fault) for fault in faults] == [True]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends_of_every_kind(tmp_path, encoding, end):
    text = LINES.decode().replace("\n", end)
    (tmp_path / "a.jsonl").write_bytes(text.encode(encoding))
    assert [where for where, _ in open_rows(tmp_path / "a.jsonl")] == ["line 1", "line 2", "line 3"]
    assert rows_of(tmp_path / "a.jsonl") == ROWS
    (tmp_path / "b.json").write_bytes(json.dumps(ROWS, indent=1).replace("\n", end).encode(encoding))
    assert rows_of(tmp_path / "b.json") == ROWS
    (tmp_path / "c.csv").write_bytes(f"prompt;n{end}a,b;1{end}é;2".encode(encoding))
    assert rows_of(tmp_path / "c.csv") == [{"prompt": "a,b", "n": "1"}, {"prompt": "é", "n": "2"}]
    (tmp_path / "d.txt").write_bytes(f"one{end}two{end}{end}three".encode(encoding))
    assert list(open_documents(str(tmp_path / "d.txt"), split_blank_lines=True)) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("encoding", "word"), [("cp1252", "Größe €"), ("gb18030", "简体中文"), ("shift_jis", "表示"), ("utf-16-le", "ü三")]
)
def test_an_encoding_that_is_named_is_used_where_no_mark_says_another(tmp_path, encoding, word):
    row = {"prompt": word, "chosen": f"{word}\\", "rejected": "r"}
    text = json.dumps(row, ensure_ascii=False) + "\n"
    content = text.encode(encoding)
    if shutil.which("iconv"):
        command = ["iconv", "-f", "utf-8", "-t", encoding.replace("16-le", "16le")]
        assert subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout == content
    (tmp_path / "a.jsonl").write_bytes(content * 2)
    assert rows_of(tmp_path / "a.jsonl", encoding=encoding) == [row] * 2
    assert [one.chosen for one in read_preferences(tmp_path / "a.jsonl", encoding=encoding)] == [row["chosen"]] * 2
    (tmp_path / "b.json").write_bytes(f"[{text}]".encode("utf-8-sig"))
    assert rows_of(tmp_path / "b.json", encoding=encoding) == [row]
    (tmp_path / "c.txt").write_bytes(word.encode(encoding))
    assert list(open_documents(str(tmp_path / "c.txt"), encoding=encoding)) == [word]
    with pytest.raises(InputError, match=r"not UTF-8: .* \(--encoding names another encoding\)|not JSON"):
        rows_of(tmp_path / "a.jsonl")


def test_encodings_that_are_none_are_refused():
    for name in ("", "none", "zip", "rot13", "idna", "unicode_escape", "utf-8\0"):
        with pytest.raises(InputError, match=r"--encoding .*: no encoding of texts that Python knows"):
            check_encoding(name)
    check_encoding("Latin-1")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.csv", {}),
        ("a.csv", {"delimiter": ";"}),
        ("a.csv", {"delimiter": "\t"}),
        ("a.csv", {"delimiter": "|", "quoting": csv.QUOTE_ALL}),
        ("a.csv", {"doublequote": False, "escapechar": "\\"}),
        ("a.tsv", {"delimiter": "\t"}),
        ("a.tsv", {"delimiter": "\t", "lineterminator": "\n"}),
        ("a.tsv", {}),
    ],
)
def test_tables_of_every_dialect_hold_the_same_rows(tmp_path, name, options):
    with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0], **options)
        writer.writeheader()
        writer.writerows(ROWS)
    assert rows_of(tmp_path / name) == ROWS


cells = st.text(st.sampled_from("ab ;,|\t\"'\n\\é"), min_size=1, max_size=9)


@settings(max_examples=150)
@given(
    rows=st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=9),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_csv_writes_is_read_back(tmp_path_factory, rows, delimiter, quoting):
    path = tmp_path_factory.getbasetemp() / "table.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
        writer.writerows([("prompt", "chosen", "rejected"), *rows])
    assert [tuple(row.values()) for row in rows_of(path)] == rows


def test_excels_own_line_tells_what_parts_the_fields(tmp_path):
    (tmp_path / "a.csv").write_text("sep=;\r\nprompt;n\r\na,b;1\r\n1\r\n")
    faults: list[InputError] = []
    assert [row for _, row in open_rows(tmp_path / "a.csv", faults.append)] == [{"prompt": "a,b", "n": "1"}]
    assert "a.csv: row 2: 1 fields; the first line names 2 (parted by ';'; line 4)" in str(faults[0])


MESSAGES = [{"content": "It's \"x\" } {\n[new]", "role": "user"}, {"content": "é", "role": "assistant"}]


def as_pandas_writes_arrays(messages) -> str:
    import numpy as np

    return str(np.array(messages, dtype=object))


@pytest.mark.parametrize("write", [json.dumps, lambda m: json.dumps(m, indent=1), str, as_pandas_writes_arrays])
def test_messages_that_were_printed_into_cells_are_messages(tmp_path, write):
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "chosen", "rejected"), ("Hi", write(MESSAGES), write(MESSAGES[:1]))])
    assert rows_of(tmp_path / "a.csv") == [{"prompt": "Hi", "chosen": MESSAGES, "rejected": MESSAGES[:1]}]


def test_what_only_begins_like_messages_is_refused_and_other_lists_are_texts(tmp_path):
    texts = ["[1, 2]", "['a', 'b']", "{'a': 1}", "[{'a': 1}]", '{"role": 1}', "[{role: content}]"]
    broken = ["[{'role': 'user', 'content': 'Hi'", "[{'role': 'user', 'content': open('x')}]", "[{'role': 'a', 'content': 'b'} ... ]"]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("chosen", "n"), *((text, "1") for text in texts + broken)])
    faults: list[InputError] = []
    assert [row["chosen"] for _, row in open_rows(tmp_path / "a.csv", faults.append)] == texts
    assert len(faults) == 3
    for i, fault in enumerate(faults, start=7):
        assert f"row {i}: field 'chosen' looks like a printed list of messages" in str(fault)


def test_datasets_saved_and_cloned_are_their_rows_alone(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:2]), test=datasets.Dataset.from_list(ROWS[2:]))
    saved.save_to_disk(str(tmp_path / "saved"))
    cached = next((tmp_path / "saved" / "test").glob("*.arrow"))
    shutil.copy(cached, tmp_path / "saved" / "train" / "cache-0123456789abcdef.arrow")
    paths = expand(tmp_path / "saved")
    assert [row for path in paths for row in rows_of(path)] == [*ROWS[2:], *ROWS[:2]]
    assert [row for path in of_split(paths, tmp_path / "saved", "train") for row in rows_of(path)] == ROWS[:2]

    clone = tmp_path / "clone"
    for name in ("README.md", ".gitattributes", "dataset_infos.json", "data/dataset_info.json", "loader.py", ".git/objects/info/x.json"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("{}")
    files = {"train-00000-of-00002": ROWS[:1], "train-00001-of-00002": ROWS[1:2], "trained": [], "test-00000-of-00001": ROWS[2:]}
    schema = pa.schema([("prompt", pa.string()), ("n", pa.string())])
    for name, rows in files.items():
        parquet.write_table(pa.Table.from_pylist(rows, schema), clone / "data" / f"{name}.parquet")
    assert len(expand(clone)) == 4
    assert [row for path in of_split(expand(clone), clone, "train") for row in rows_of(path)] == ROWS[:2]


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_arrow_files_and_streams_are_told_apart(tmp_path, compression):
    table = pa.Table.from_pylist(ROWS)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        with new(str(tmp_path / "a.arrow"), table.schema, options=options) as file:
            file.write_table(table, max_chunksize=2)
        assert rows_of(tmp_path / "a.arrow") == ROWS
    content = (tmp_path / "a.arrow").read_bytes()
    for n in range(0, len(content) - 20, 97):
        (tmp_path / "a.arrow").write_bytes(content[:n])
        with pytest.raises(InputError, match=r"a.arrow: not an intact .arrow file, after row \d: "):
            rows_of(tmp_path / "a.arrow")


def parquet_of(columns, **options) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pa.table(columns), file, **options)
    return file.getvalue()


@pytest.mark.parametrize("options", [{"compression": "zstd", "use_dictionary": False}, {"compression": "gzip", "data_page_version": "2.0"}])
def test_parquet_that_repeats_itself_is_read_within_bounds(tmp_path, options):
    """200 MB in 0.2 MB or less: of one text, and of texts that hardly differ."""
    text = "word " * 2000
    for texts in ([text] * 20_000, [f"{text}{i % 9}" for i in range(20_000)]):
        (tmp_path / "a.parquet").write_bytes(parquet_of({"text": texts}, **options))
        assert 200 * (tmp_path / "a.parquet").stat().st_size < 200_000_000
        before = pa.total_allocated_bytes()
        n, most = 0, 0
        for _, row in open_rows(tmp_path / "a.parquet"):
            assert row["text"] == texts[n]
            n += 1
            most = max(most, pa.total_allocated_bytes() - before) if n % 100 == 0 else most
        assert n == 20_000
        # A page of 1,024 such texts in pyarrow's writing, twice while the next one is unpacked, or a batch of 256.
        assert most < 48 << 20


def test_parquet_pages_that_are_made_to_fill_a_memory_are_refused_unopened(tmp_path):
    big = "a" * (64 << 20)
    columns = {name: [big] for name in "abc"}
    (tmp_path / "a.parquet").write_bytes(parquet_of(columns, compression="zstd", use_dictionary=False))
    before = pa.total_allocated_bytes()
    with pytest.raises(InputError, match=r"a.parquet: not an intact .parquet file, after row 0: its pages unpack to 2\d+ bytes"):
        rows_of(tmp_path / "a.parquet")
    assert pa.total_allocated_bytes() == before


def test_a_row_that_repeats_a_large_text_comes_in_small_batches(tmp_path):
    big = "y" * (8 << 20)
    table = pa.table({"text": pa.DictionaryArray.from_arrays([0] * 50, [big])})
    parquet.write_table(table, tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 30)
    tracemalloc.start()
    assert sum(len(row["text"]) for _, row in open_rows(tmp_path / "a.parquet")) == 50 * len(big)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * arrow_rows._BATCH


@settings(max_examples=40)
@given(
    n=st.integers(0, 50),
    size=st.integers(0, 3000),
    version=st.sampled_from(["1.0", "2.0"]),
    compression=st.sampled_from(["none", "snappy", "zstd", "gzip"]),
    page=st.sampled_from([100, 1 << 20]),
    groups=st.integers(1, 60),
)
def test_the_largest_page_is_what_pyarrow_wrote(n, size, version, compression, page, groups):
    """Each column of a row group takes at least its largest page, and at most all of its pages."""
    texts = [str(i) * size for i in range(n)]
    content = parquet_of(
        {"a": texts, "b": [[text] for text in texts]},
        data_page_version=version, compression=compression, data_page_size=page, row_group_size=groups, write_page_index=True,
    )  # fmt: skip
    facts = parquet.ParquetFile(io.BytesIO(content)).metadata
    most = max((facts.row_group(i).total_byte_size for i in range(facts.num_row_groups)), default=0)
    found = largest_pages(io.BytesIO(content))
    assert found.size <= max(most, 8 * n)
    assert (found.size > 0) == (n > 0)
    assert found.dictionaries <= found.size
