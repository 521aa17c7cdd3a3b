"""make_data.py, run as users run it."""

import gzip
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.batches.sampling import item_at, largest_magic_prime
from rwkv_dpo.commands import make_data as script
from rwkv_dpo.data.binidx import read_binidx
from rwkv_dpo.data.tokenizer import WorldTokenizer

SCRIPT = Path(__file__).resolve().parents[1] / "RWKV-v5" / "make_data.py"
TEXTS = ["One.", "Zwei\n\nTeile", "三", "four four four"]


@pytest.fixture
def make_data(lives):
    return lambda folder, *arguments, **options: lives.script(SCRIPT, arguments, folder, **options)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "demo.jsonl"
    path.write_text("".join(json.dumps({"text": text, "title": "t"}) + "\n" for text in [*TEXTS, ""]), "utf-8")
    return path


def decoded(prefix):
    corpus, tokenizer = read_binidx(prefix), WorldTokenizer()
    documents = [corpus.document(i).tolist() for i in range(len(corpus))]
    assert all(document.index(0) == len(document) - 1 for document in documents)
    assert corpus.tokens.dtype == np.uint16
    return [tokenizer.decode(document) for document in documents]


def test_every_pass_holds_every_document_in_a_new_order(make_data, source):
    run = make_data(source.parent, source, 3, 4)
    assert run.returncode == 0, run.stderr
    documents = decoded(source.with_suffix(""))
    passes = [documents[i : i + 4] for i in (0, 4, 8)]
    assert [sorted(one) for one in passes] == [sorted(TEXTS)] * 3
    assert passes[0] != passes[1] or passes[1] != passes[2]
    n_tokens = len(read_binidx(source.with_suffix("")).tokens)
    assert f"12 documents, {n_tokens} tokens in 3 passes of 4" in run.stdout
    assert f"--my_exit_tokens {n_tokens} --magic_prime {largest_magic_prime(n_tokens, 4)} --ctx_len 4" in run.stdout


def test_seed_field_and_out_do_what_they_say(make_data, source, tmp_path):
    orders = []
    for seed in range(4):
        assert make_data(tmp_path, source, "--seed", seed, "--out", tmp_path / "out").returncode == 0
        orders.append(tuple(decoded(tmp_path / "out")))
    assert len(set(orders)) > 1
    assert make_data(tmp_path, source, "--field", "title", "--out", tmp_path / "out").returncode == 0
    assert decoded(tmp_path / "out") == ["t"] * 5


def test_a_text_file_is_one_document_or_many(make_data, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert make_data(tmp_path, "a.txt").returncode == 0
    assert decoded(tmp_path / "a") == ["one\n\ntwo\n"]
    assert make_data(tmp_path, "a.txt", "--split_blank_lines").returncode == 0
    assert sorted(decoded(tmp_path / "a")) == ["one", "two"]


def test_bytes_are_those_of_the_format_in_the_order_of_the_sampler(make_data, source):
    assert make_data(source.parent, source, 2, "--seed", 5).returncode == 0
    encode = WorldTokenizer().encode
    documents = [[*encode(TEXTS[item_at(i, 4, 5)]), 0] for i in range(8)]
    tokens = [token for document in documents for token in document]
    assert source.with_suffix(".bin").read_bytes() == struct.pack(f"<{len(tokens)}H", *tokens)
    sizes = [len(document) for document in documents]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 8, 9)
    index = struct.pack("<8i8q9q", *sizes, *(2 * sum(sizes[:i]) for i in range(8)), *range(9))
    assert source.with_suffix(".idx").read_bytes() == header + index


def test_many_processes_write_what_one_writes(tmp_path, monkeypatch):
    words = random.Random(0)
    texts = ["".join(words.choices("abc dé三\n", k=words.randrange(1, 3000))) for _ in range(1000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    for name, n_cores in (("one", 1), ("many", 3)):
        monkeypatch.setattr("rwkv_dpo.data.spool._n_cores", lambda n=n_cores: n)
        script.main(["a.jsonl", "1", "--out", name])
    assert Path("one.bin").read_bytes() == Path("many.bin").read_bytes()
    assert Path("one.idx").read_bytes() == Path("many.idx").read_bytes()
    assert sorted(decoded("many")) == sorted(texts)


def test_folders_globs_and_packed_files_are_read(make_data, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "b.txt").write_text("b")
    (tmp_path / "texts" / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}'))
    (tmp_path / "texts" / "c.csv").write_text("text\nc\n")
    assert make_data(tmp_path, "texts").returncode == 0
    assert sorted(decoded(tmp_path / "texts")) == ["a", "b", "c"]
    assert make_data(tmp_path, "texts/[ab].*", "--out", "ab").returncode == 0
    assert sorted(decoded(tmp_path / "ab")) == ["a", "b"]
    assert make_data(tmp_path, "texts/a.jsonl.gz").returncode == 0
    assert decoded(tmp_path / "a") == ["a"]


def test_bad_rows_are_skipped_and_counted_when_asked(make_data, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text"\n{"body": "b"}\n{"text": "c"}\n')
    assert make_data(tmp_path, "a.jsonl").stderr.startswith("make_data.py: a.jsonl: line 2: not JSON")
    assert not (tmp_path / "a.bin").exists()
    run = make_data(tmp_path, "a.jsonl", "--on_error", "skip")
    assert run.returncode == 0
    assert "2 rows skipped" in run.stdout
    assert "skipped: a.jsonl: line 2: not JSON" in run.stderr
    assert sorted(decoded(tmp_path / "a")) == ["a", "c"]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    pytest.importorskip("resource")
    # Without the tokenizer, which takes 200 MB whatever the corpus: it is with the two processes, and skips the last check.
    measured = (
        "import sys, resource; from rwkv_dpo.commands import make_data; from rwkv_dpo.data import spool;"
        "spool._n_cores = lambda: 2; make_data.verify = print;"
        "make_data.main(sys.argv[1:]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for n in (1000, 10_000):
        with open(tmp_path / "a.jsonl", "w") as file:
            file.writelines(json.dumps({"text": f"{i} {'word ' * 1000}"}) + "\n" for i in range(n))
        command = [sys.executable, "-c", measured, "a.jsonl", "2"]
        env = {**os.environ, "PYTHONPATH": str(SCRIPT.parent / "src")}
        run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
        peaks.append(int(run.stdout.split()[-1]))
    # Kilobytes, on Linux. The texts alone grow by 45 MB, the tokens of a pass by 18; allowed is what the allocator leaves about.
    assert peaks[1] - peaks[0] < 8000


@pytest.mark.parametrize("limit", [10_000, 50_000])
def test_a_full_disk_is_one_line_and_the_old_corpus_stays(make_data, tmp_path, limit):
    """A limit on the size of a file stands in for the disk: it stops the spool of 22,000 bytes, or the corpus of three passes."""
    pytest.importorskip("resource")
    (tmp_path / "a.jsonl").write_text('{"text": "old"}')
    assert make_data(tmp_path, "a.jsonl").returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".jsonl"}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "word " * 100}) + "\n" for _ in range(100)))
    limited = make_data(tmp_path, "a.jsonl", 3, limit=limit)
    assert limited.returncode == 2
    assert limited.stderr == "make_data.py: a.bin: cannot be written: File too large\n"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".jsonl"} == before


def test_a_corpus_that_reads_back_as_another_text_is_told(source, monkeypatch):
    monkeypatch.chdir(source.parent)
    monkeypatch.setattr(script.WorldTokenizer, "decode", lambda self, ids: "something else")
    with pytest.raises(InputError, match=r"demo.bin: document \d reads back as a different text"):
        script.main(["demo.jsonl"])


def test_it_starts_as_a_program():
    assert os.access(SCRIPT, os.X_OK)
    assert SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")
    done = subprocess.run([sys.executable, SCRIPT, "missing.txt"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "make_data.py: missing.txt: cannot be read: No such file or directory\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "missing.txt: cannot be read: No such file or directory"),
        (["empty.txt"], "empty.txt: no document with text in it"),
        (["bad.jsonl"], "bad.jsonl: line 1: not JSON"),
        (["demo.jsonl", "0"], "PASSES 0, CTX_LEN 4096: both are at least 1"),
        (["*.jsonl"], "--out: needed, because INPUT is the pattern *.jsonl"),
        (["*.parquet", "--out", "a"], "*.parquet: matches no file"),
        (["demo.jsonl", "--field", "body"], "demo.jsonl: line 1: no field 'body', found 'text', 'title'"),
        (["demo.jsonl", "--out", "nowhere/a"], "nowhere/a.bin: cannot be written: No such file or directory"),
    ],
)
def test_faults_are_one_line_and_exit_2_and_nothing_half_written(make_data, source, arguments, message):
    folder = source.parent
    (folder / "empty.txt").write_text("")
    (folder / "bad.jsonl").write_text("{")
    before = sorted(folder.iterdir())
    run = make_data(folder, *arguments)
    assert run.returncode == 2
    assert run.stderr.startswith(f"make_data.py: {message}")
    assert run.stderr.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_a_corpus_too_short_for_a_magic_prime_says_so_and_prints_none():
    # 2 is the smallest prime 3n + 2, and it has to be at most the windows less one.
    assert script.flags_of(12, 4) == ["--my_exit_tokens 12 --magic_prime 2 --ctx_len 4"]
    assert script.flags_of(11, 4) == [
        "--my_exit_tokens 11 --ctx_len 4",
        "no --magic_prime: it needs at least 3 windows, and there are 2 of 4 tokens",
    ]
    assert script.flags_of(4, 4) == ["4 tokens are less than one window of 4: use train.py with --ctx_len 3 or less"]
