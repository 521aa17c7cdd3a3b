"""Corpora of every --data_type, and what is refused at the door."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import rwkv
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import make_data
from rwkv_dpo.data import corpus as corpus_module
from rwkv_dpo.data import text_corpus
from rwkv_dpo.data.binidx import read_binidx, write_binidx
from rwkv_dpo.data.corpus import open_corpus
from rwkv_dpo.data.corpus_names import name_corpus

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
    with pytest.raises(InputError, match=r"a.npy: (holds|not an intact)"):
        open_corpus(str(tmp_path / "a.npy"), "numpy", vocab_size=10, ctx_len=2)


def test_broken_files_are_refused(tmp_path):
    (tmp_path / "odd").write_bytes(b"\1\2\3")
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY\x01\x00")
    np.save(tmp_path / "cut.npy", np.arange(100))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    np.savez(tmp_path / "a.npz", np.arange(100))
    for name, data_type, message in [
        ("odd", "uint16", "odd: 3 bytes, an odd number"),
        ("torn.npy", "numpy", "torn.npy: not an intact .npy"),
        ("cut.npy", "numpy", "cut.npy: not an intact .npy"),
        ("a.npz", "numpy", "a.npz: an .npz archive"),
        ("torn.npy", "utf-8", "torn.npy: not utf-8 text but a NumPy array"),
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


STORY = "Once there was a fox.\n\nFüchse 🦊, 狐狸住在这里。 It slept.\n"


@pytest.fixture(scope="module")
def world():
    """The `rwkv` package's own tokenizer."""
    return TRIE_TOKENIZER(str(Path(rwkv.__file__).parent / "rwkv_vocab_v20230424.txt")).encode


def write_text(path, texts):
    """One document in a text file, or one a row."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    content = rows.encode() if ".jsonl" in path.name else texts[0].encode("utf-16le" if path.suffix == ".utf16" else "utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["story.txt", "story.txt.gz", "story.md", "story.jsonl", "story.jsonl.gz", "story.utf16"])
def test_text_for_a_world_vocabulary_is_world_tokens(tmp_path, world, name):
    texts = [STORY, "Two."] if "jsonl" in name else [STORY]
    encoding = "utf-16le" if name == "story.utf16" else "utf-8"
    write_text(tmp_path / name, texts)
    corpus = open_corpus(str(tmp_path / name), encoding, vocab_size=65536, ctx_len=4, checkpoint="World.pth")
    assert corpus.tokens.tolist() == [token for text in texts for token in (*world(text), 0)]
    assert corpus.characters == ""
    assert "World tokenizer" in corpus.how


def test_a_folder_of_texts_is_what_make_data_makes_of_it(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i} {STORY}")
    corpus = open_corpus(str(tmp_path / "texts"), "utf-8", vocab_size=65536, ctx_len=4)
    make_data.main([str(tmp_path / "texts"), "1", "--out", str(tmp_path / "made")])
    made = read_binidx(tmp_path / "made")
    # make_data.py shuffles the documents.
    assert sorted(corpus.tokens.tolist()) == sorted(made.tokens.tolist())
    assert corpus.tokens[: len(made.document(0))].tolist() in [made.document(i).tolist() for i in range(3)]


def test_much_text_is_left_to_make_data(tmp_path, monkeypatch):
    monkeypatch.setattr(text_corpus, "MAX_TEXT", 100)
    (tmp_path / "story.txt").write_text("a" * 101)
    (tmp_path / "story.md").write_text("a" * 101)
    (tmp_path / "story.txt.gz").write_bytes(gzip.compress(b"a" * 101))
    for name in ("story.txt", "story.md", "story.txt.gz"):
        with pytest.raises(InputError, match=rf"{name}: more text than .*make_data.py .*{name} 1 --out corpus"):
            open_corpus(str(tmp_path / name), "utf-8", vocab_size=65536, ctx_len=4)
    (tmp_path / "story.txt").write_text("a" * 100)
    assert open_corpus(str(tmp_path / "story.txt"), "utf-8", vocab_size=65536, ctx_len=4).n_tokens > 4
    # Before it is read, which would find a fault in its first byte.
    (tmp_path / "story.txt").write_bytes(b"\xff" * 101)
    with pytest.raises(InputError, match=r"story.txt: more text than"):
        open_corpus(str(tmp_path / "story.txt"), "utf-8", vocab_size=65536, ctx_len=4)


def save_vocabulary(folder, characters):
    """As RWKV-LM's src/dataset.py writes it."""
    with open(folder / "vocab.json", "w", encoding="utf-16le") as file:
        file.write(json.dumps(dict(enumerate(characters)), ensure_ascii=False))


def test_characters_have_the_numbers_that_their_model_was_trained_with(tmp_path):
    save_vocabulary(tmp_path, "\n bcxyz")
    (tmp_path / "other.txt").write_text("zy xb")
    corpus = open_corpus(str(tmp_path / "other.txt"), "utf-8", vocab_size=7, ctx_len=2, checkpoint=str(tmp_path / "rwkv-final.pth"))
    assert corpus.tokens.tolist() == [6, 5, 1, 4, 2]
    assert corpus.characters == "\n bcxyz"
    (tmp_path / "more.txt").write_text("zyé")
    with pytest.raises(InputError, match=r"more.txt: character 'é' \(at 2\) is not in .*vocab.json"):
        open_corpus(str(tmp_path / "more.txt"), "utf-8", vocab_size=7, ctx_len=2, checkpoint=str(tmp_path / "rwkv-final.pth"))


def test_a_vocabulary_that_an_editor_has_saved_is_read(tmp_path):
    (tmp_path / "text.txt").write_text("cabé")
    (tmp_path / "vocab.json").write_text('\ufeff{"0": "a",\n "1": "b", "2": "c", "3": "é"}\n', encoding="utf-8")
    corpus = open_corpus(str(tmp_path / "text.txt"), "utf-8", vocab_size=4, ctx_len=2, checkpoint=str(tmp_path / "rwkv-final.pth"))
    assert corpus.tokens.tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("content", [
    None, b"{", json.dumps({"the": 0, "a": 1}).encode(), "[]".encode("utf-16le"), b"\xff\xfe\0", b'{"0": "ab", "1": "c"}',
    b'{"0": "a", "1": "a"}', b'{"0": "a", "1": 5}', b'{"1": "a", "0": "b"}',
])  # fmt: skip
def test_a_model_of_neither_world_nor_characters_takes_no_text(tmp_path, content):
    (tmp_path / "story.txt").write_text(STORY)
    if content is not None:
        (tmp_path / "vocab.json").write_bytes(content)
    with pytest.raises(InputError, match=r"story.txt: text for .*NeoX.pth, whose 50277 tokens are not the World's.*vocab.json"):
        open_corpus(str(tmp_path / "story.txt"), "utf-8", vocab_size=50277, ctx_len=2, checkpoint=str(tmp_path / "NeoX.pth"))


def test_a_world_checkpoint_beside_a_vocabulary_of_characters_is_not_guessed_about(tmp_path):
    save_vocabulary(tmp_path, "abc")
    (tmp_path / "story.txt").write_text("abc" * 9)
    with pytest.raises(InputError, match=r"World.pth has the World vocabulary, but .*vocab.json next to it lists 3 characters"):
        open_corpus(str(tmp_path / "story.txt"), "utf-8", vocab_size=65536, ctx_len=2, checkpoint=str(tmp_path / "World.pth"))


def test_rows_are_no_characters(tmp_path):
    write_text(tmp_path / "story.jsonl", [STORY])
    with pytest.raises(InputError, match=r"story.jsonl: characters are read from one plain text file; .*--vocab_size 65536"):
        open_corpus(str(tmp_path / "story.jsonl"), "utf-8", vocab_size=0, ctx_len=2)


def test_a_name_with_brackets_is_a_file_when_there_is_one_and_else_a_pattern(tmp_path, world):
    for i in (1, 2):
        (tmp_path / f"story[{i}].txt").write_text(STORY)
    assert open_corpus(str(tmp_path / "story[1].txt"), "utf-8", vocab_size=0, ctx_len=2).characters == "".join(sorted(set(STORY)))
    assert open_corpus(str(tmp_path / "*.txt"), "utf-8", vocab_size=65536, ctx_len=2).tokens.tolist() == 2 * [*world(STORY), 0]
    with pytest.raises(InputError, match="characters are read from one plain text file"):
        open_corpus(str(tmp_path / "*.txt"), "utf-8", vocab_size=0, ctx_len=2)


def test_the_file_tells_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_binidx("corpus", [TOKENS])
    np.save("array.npy", TOKENS)
    Path("array.npy").rename("array")
    Path("story.txt").write_text(STORY)
    Path("windows.txt").write_text(STORY, encoding="utf-16")
    Path("bare.bin").write_bytes(TOKENS.tobytes())
    for named, expected in {
        "corpus": ("corpus", "binidx"), "corpus.bin": ("corpus", "binidx"), "corpus.idx": ("corpus", "binidx"),
        "array": ("array", "numpy"), "story.txt": ("story.txt", "utf-8"), "windows.txt": ("windows.txt", "utf-16le"),
        "nowhere": ("nowhere", "utf-8"),
    }.items():  # fmt: skip
        assert name_corpus(named) == expected
    assert name_corpus("corpus.bin", "binidx") == ("corpus", "binidx")
    assert name_corpus("corpus.bin", "uint16") == ("corpus.bin", "uint16")
    assert open_corpus("windows.txt", "utf-16le", 0, 4).characters == "".join(sorted(set(STORY)))
    write_binidx("wiki_text_document", [TOKENS])
    for named, data_type, message in [
        ("wiki", "", r"--data_file wiki: no such file; wiki_text_document is the corpus that json2binidx wrote"),
        ("bare.bin", "", r"bare.bin: no binidx corpus without both bare.bin and .idx; --data_type uint16"),
        ("corpus", "utf-8", r"--data_type utf-8: corpus.bin and .idx are a binidx corpus"),
        ("corpus.bin", "numpy", r"--data_type numpy: corpus.bin and .idx are a binidx corpus"),
        ("story.txt", "binidx", r"--data_type binidx: story.txt has no story.txt.idx and .bin"),
    ]:
        with pytest.raises(InputError, match=message):
            name_corpus(named, data_type)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12345\n"


def test_what_a_file_is_is_said_where_another_was_wanted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(Path("story.jsonl"), [STORY] * 9)
    Path("story.txt").write_text(STORY)
    Path("pointer.txt").write_bytes(POINTER)
    Path("latin1.txt").write_bytes("Füchse".encode("latin-1"))
    np.save("array.npy", TOKENS)
    write_binidx("c", [TOKENS])
    Path("p.idx").write_bytes(POINTER)
    Path("p.bin").write_bytes(POINTER)
    Path("q.idx").write_bytes(Path("c.idx").read_bytes())
    Path("q.bin").write_bytes(POINTER)
    for named, data_type, message in [
        ("story.txt", "uint16", "story.txt: not bare tokens but plain text; make_data.py story.txt makes a corpus of it"),
        ("story.jsonl", "uint16", "story.jsonl: not bare tokens but JSON lines"),
        ("array.npy", "uint16", "array.npy: not bare tokens but a NumPy array"),
        ("array.npy", "utf-8", "array.npy: not utf-8 text but a NumPy array"),
        ("latin1.txt", "utf-8", "latin1.txt: not UTF-8: invalid start byte at byte 1"),
        ("story.txt", "numpy", "story.txt: not a .npy file but plain text"),
        ("pointer.txt", "utf-8", "pointer.txt: not text but a Git LFS pointer"),
        ("p", "binidx", "p.idx: not a binidx index but a Git LFS pointer"),
        ("q", "binidx", "q.bin: not a corpus's tokens but a Git LFS pointer"),
    ]:
        with pytest.raises(InputError, match=message):
            open_corpus(named, data_type, vocab_size=65536, ctx_len=2)
