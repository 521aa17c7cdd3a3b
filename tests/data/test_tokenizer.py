"""The World tokenizer against the `rwkv` package's, which is slow and the reference."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.tokenizer import DOCUMENT_END, VOCAB_SIZE, WorldTokenizer

rwkv_tokenizer = pytest.importorskip("rwkv.rwkv_tokenizer")

# Characters that tokenizers stumble over: controls, combining marks, joiners, right-to-left, surrogate-pair territory, runs.
ODD_PIECES = (
    "\x00", "\r\n", "\n\n\n", "   ", "\u200d", "👩\u200d👩\u200d👧\u200d👦", "e\u0301", "العربية", "日本語", "\U0010ffff", "\ufeff",
    "def f():\n\t",
)  # fmt: skip
ODD_TEXT = st.lists(st.one_of(st.text(), st.sampled_from(ODD_PIECES))).map("".join)


@pytest.fixture(scope="module")
def ours():
    return WorldTokenizer()


@pytest.fixture(scope="module")
def reference():
    return rwkv_tokenizer.TRIE_TOKENIZER(str(Path(rwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")))


@settings(max_examples=300)
@example("")
@given(text=ODD_TEXT)
def test_tokens_are_those_of_the_rwkv_package_and_decode_to_the_text(ours, reference, text):
    tokens = ours.encode(text)
    assert tokens == reference.encode(text)
    assert ours.decode(tokens) == text
    assert DOCUMENT_END not in tokens


@settings(max_examples=200)
@given(tokens=st.lists(st.integers(1, 65529), max_size=20))
def test_any_tokens_decode_to_the_bytes_of_the_rwkv_package(ours, reference, tokens):
    assert ours.decode(tokens) == reference.decodeBytes(tokens).decode("utf-8", errors="replace")


def test_half_a_character_decodes_to_the_replacement_character(ours):
    # Tokens 1 to 256 are the single bytes: 0xF0 0x9F begins an emoji and goes no further.
    assert ours.decode([ord("a") + 1, 0xF0 + 1, 0x9F + 1]) == "a\ufffd"


def test_the_document_end_decodes_to_nothing(ours):
    assert ours.decode([ord("a") + 1, DOCUMENT_END, ord("b") + 1]) == "ab"


@pytest.mark.parametrize("token", [65530, VOCAB_SIZE - 1, VOCAB_SIZE, -1, 2**40])
def test_ids_outside_the_vocabulary_are_refused(ours, token):
    with pytest.raises(InputError, match=rf"token {token} is outside the tokenizer's 0 to 65529"):
        ours.decode([5, token])


def test_a_lone_surrogate_is_refused_with_its_place(ours):
    with pytest.raises(InputError, match=r"lone surrogate at character 2: '\\ud800'"):
        ours.encode("ab\ud800")
