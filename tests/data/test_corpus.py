"""Corpora of every --data_type, and what is refused at the door."""

import numpy as np
import pytest
from rwkv_dpo.data import corpus as corpus_module
from rwkv_dpo.data.binidx import write_binidx
from rwkv_dpo.data.corpus import open_corpus
from rwkv_dpo.errors import InputError

TOKENS = np.array([5, 0, 9, 9, 3, 1, 2], dtype=np.uint16)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16le"])
def test_a_text_becomes_characters_sorted_by_code_point(tmp_path, encoding):
    text = "b😀a\nbé"
    (tmp_path / "text").write_bytes(text.encode(encoding))
    corpus = open_corpus(str(tmp_path / "text"), encoding, vocab_size=0, ctx_len=5)
    assert corpus.characters == "\nabé😀"
    assert corpus.vocab_size == 5
    assert "".join(corpus.characters[i] for i in corpus.window(0, corpus.n_tokens)) == text


def test_a_text_accepts_a_larger_vocabulary_and_refuses_a_smaller_one(tmp_path):
    (tmp_path / "text").write_text("abcd")
    assert open_corpus(str(tmp_path / "text"), "utf-8", vocab_size=100, ctx_len=2).vocab_size == 100
    with pytest.raises(InputError, match=r"text: the text has 4 different characters, more than --vocab_size 3"):
        open_corpus(str(tmp_path / "text"), "utf-8", vocab_size=3, ctx_len=2)


def write(tmp_path, data_type, tokens):
    path = tmp_path / "corpus"
    if data_type == "binidx":
        write_binidx(path, [tokens[:3], tokens[3:]], tokens.dtype.type)
    elif data_type == "uint16":
        path.write_bytes(tokens.astype("<u2").tobytes())
    else:
        with open(path, "wb") as file:
            np.save(file, tokens)
    return str(path)


@pytest.mark.parametrize("data_type", ["numpy", "uint16", "binidx"])
def test_windows_are_the_tokens_of_the_file(tmp_path, data_type):
    corpus = open_corpus(write(tmp_path, data_type, TOKENS), data_type, vocab_size=10, ctx_len=6)
    assert (corpus.n_tokens, corpus.vocab_size) == (7, 10)
    window = corpus.window(2, 4)
    assert window.dtype == np.int64
    assert window.tolist() == [9, 9, 3, 1]
    assert corpus.window(7, 0).tolist() == []
    with pytest.raises(IndexError):
        corpus.window(4, 4)


@pytest.mark.parametrize("data_type", ["numpy", "uint16", "binidx"])
def test_a_token_outside_the_vocabulary_is_named_with_its_offset(tmp_path, data_type):
    path = write(tmp_path, data_type, TOKENS)
    with pytest.raises(InputError, match=r"corpus: token 9 at offset 2 is outside --vocab_size 9"):
        open_corpus(path, data_type, vocab_size=9, ctx_len=2)


def test_the_first_bad_token_is_found_in_a_later_block(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_BLOCK", 3)
    path = write(tmp_path, "numpy", np.array([1, 2, 3, 4, -1, 99], dtype=np.int32))
    with pytest.raises(InputError, match=r"token -1 at offset 4"):
        open_corpus(path, "numpy", vocab_size=50, ctx_len=2)


def test_a_corpus_too_long_to_scan_is_checked_as_windows_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "_CHECKED_AT_ONCE", 6)
    corpus = open_corpus(write(tmp_path, "uint16", TOKENS), "uint16", vocab_size=9, ctx_len=2)
    assert corpus.window(4, 3).tolist() == [3, 1, 2]
    with pytest.raises(InputError, match=r"token 9 at offset 3 is outside"):
        corpus.window(3, 2)


@pytest.mark.parametrize("data_type", ["numpy", "uint16", "binidx"])
def test_token_files_need_a_vocabulary_size(tmp_path, data_type):
    with pytest.raises(InputError, match=r"--vocab_size 0"):
        open_corpus(write(tmp_path, data_type, TOKENS), data_type, vocab_size=0, ctx_len=2)


def test_a_corpus_holds_one_window_or_is_refused(tmp_path):
    path = write(tmp_path, "uint16", TOKENS)
    assert open_corpus(path, "uint16", vocab_size=10, ctx_len=6).n_tokens == 7
    with pytest.raises(InputError, match=r"corpus: 7 tokens, fewer than one window of --ctx_len 7 \+ 1"):
        open_corpus(path, "uint16", vocab_size=10, ctx_len=7)


@pytest.mark.parametrize("data_type", ["utf-8", "utf-16le", "numpy", "uint16", "binidx"])
def test_a_missing_file_is_named(tmp_path, data_type):
    with pytest.raises(InputError, match=r"nowhere.*no such file"):
        open_corpus(str(tmp_path / "nowhere"), data_type, vocab_size=10, ctx_len=2)


@pytest.mark.parametrize("array", [np.zeros((2, 2), int), np.zeros(5), np.array([{}])], ids=["2-d", "float", "object"])
def test_an_array_that_is_no_row_of_integers_is_refused(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=r"a.npy: (holds|not a whole)"):
        open_corpus(str(tmp_path / "a.npy"), "numpy", vocab_size=10, ctx_len=2)


def test_broken_files_are_refused(tmp_path):
    (tmp_path / "odd").write_bytes(b"123")
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\x01\x00")
    np.save(tmp_path / "cut.npy", np.arange(100))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    np.savez(tmp_path / "a.npz", np.arange(100))
    for name, data_type, message in [
        ("odd", "uint16", "odd: 3 bytes, an odd number"),
        ("torn.npy", "numpy", "torn.npy: not a whole .npy"),
        ("cut.npy", "numpy", "cut.npy: not a whole .npy"),
        ("a.npz", "numpy", "a.npz: an .npz archive"),
        ("torn.npy", "utf-8", "torn.npy: not utf-8 text: .* at byte 0"),
        ("torn.npy", "csv", "--data_type csv: accepted are utf-8"),
    ]:
        with pytest.raises(InputError, match=message):
            open_corpus(str(tmp_path / name), data_type, vocab_size=200, ctx_len=2)


def test_the_dummy_corpus_is_the_same_every_time_and_adds_up():
    corpus = open_corpus("", "dummy", vocab_size=0, ctx_len=64)
    text = "".join(corpus.characters[i] for i in corpus.window(0, 2000))
    assert corpus.characters == "\n+0123456789="
    for line in text.split("\n")[:-1]:
        terms, total = line.split("=")
        assert sum(map(int, terms.split("+"))) == int(total)
    assert np.array_equal(corpus.tokens, open_corpus("", "dummy", vocab_size=0, ctx_len=64).tokens)
