"""make_data.py, run as users run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rwkv_dpo.data.binidx import read_binidx
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.sampling import largest_magic_prime

SCRIPT = Path(__file__).resolve().parents[1] / "RWKV-v5" / "make_data.py"
TEXTS = ["One.", "Zwei\n\nTeile", "三", "four four four"]


def make_data(folder, *arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False)


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


def test_every_pass_holds_every_document_in_a_new_order(source):
    run = make_data(source.parent, source, 3, 4)
    assert run.returncode == 0, run.stderr
    documents = decoded(source.with_suffix(""))
    passes = [documents[i : i + 4] for i in (0, 4, 8)]
    assert [sorted(one) for one in passes] == [sorted(TEXTS)] * 3
    assert passes[0] != passes[1] or passes[1] != passes[2]
    n_tokens = len(read_binidx(source.with_suffix("")).tokens)
    assert f"12 documents, {n_tokens} tokens in 3 passes of 4" in run.stdout
    assert f"--my_exit_tokens {n_tokens} --magic_prime {largest_magic_prime(n_tokens, 4)} --ctx_len 4" in run.stdout


def test_seed_field_and_out_do_what_they_say(source, tmp_path):
    orders = []
    for seed in range(4):
        assert make_data(tmp_path, source, "--seed", seed, "--out", tmp_path / "out").returncode == 0
        orders.append(tuple(decoded(tmp_path / "out")))
    assert len(set(orders)) > 1
    assert make_data(tmp_path, source, "--field", "title", "--out", tmp_path / "out").returncode == 0
    assert decoded(tmp_path / "out") == ["t"] * 5


def test_a_text_file_is_one_document_or_many(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert make_data(tmp_path, "a.txt").returncode == 0
    assert decoded(tmp_path / "a") == ["one\n\ntwo\n"]
    assert make_data(tmp_path, "a.txt", "--split_blank_lines").returncode == 0
    assert sorted(decoded(tmp_path / "a")) == ["one", "two"]


def test_it_starts_as_a_program():
    assert os.access(SCRIPT, os.X_OK)
    assert SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "missing.txt: cannot be read: No such file or directory"),
        (["empty.txt"], "empty.txt: no document with text in it"),
        (["bad.jsonl"], "bad.jsonl: line 1: not JSON"),
        (["demo.jsonl", "0"], "PASSES 0, CTX_LEN 4096: both are at least 1"),
        (["demo.jsonl", "--out", "nowhere/a"], "nowhere/a.idx: cannot be written: No such file or directory"),
    ],
)
def test_faults_are_one_line_and_exit_2_and_nothing_half_written(source, arguments, message):
    folder = source.parent
    (folder / "empty.txt").write_text("")
    (folder / "bad.jsonl").write_text("{")
    before = sorted(folder.iterdir())
    run = make_data(folder, *arguments)
    assert run.returncode == 2
    assert run.stderr.startswith(f"make_data.py: {message}")
    assert run.stderr.count("\n") == 1
    assert sorted(folder.iterdir()) == before
