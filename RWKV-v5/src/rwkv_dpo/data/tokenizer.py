"""The RWKV World tokenizer: greedy longest match over bytes, 65,529 tokens.

Encoding is the Rust package pyrwkv_tokenizer's. Decoding is ours, because the package aborts on ids outside its table and
on sequences that end within a character, both of which a sampling model produces.
"""

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

from pyrwkv_tokenizer import RWKVTokenizer

from rwkv_dpo.base.errors import InputError, refuse

NAME = "rwkv_vocab_v20230424"
# The model's vocabulary: ids above the tokenizer's last (65,529) are never made from text.
VOCAB_SIZE = 65536
LAST_TOKEN = 65529
DOCUMENT_END = 0


def check_reads_text(vocab_size: int, named: str, model: str = "it") -> None:
    """InputError for a model of fewer tokens than the tokenizer makes. named: the flag that has it read text; model: whose vocabulary."""
    if vocab_size <= LAST_TOKEN:
        refuse(f"{named}: text becomes tokens of the World tokenizer, {VOCAB_SIZE} of them; {model} has a vocabulary of {vocab_size}")


class WorldTokenizer:
    """encode and decode. Reading the vocabulary takes about 0.2 s, once per object, and once more at the first decode."""

    def __init__(self) -> None:
        self._encoder = RWKVTokenizer()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; never holds 0, the document end. InputError when a lone surrogate keeps it from being UTF-8."""
        try:
            return self._encoder.encode(text)
        except UnicodeEncodeError as error:
            raise InputError(f"the text has a lone surrogate at character {error.start}: {text[error.start]!r}") from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, the document end becomes nothing. InputError for an id
        outside the vocabulary."""
        try:
            return b"".join(self._token_bytes[i] for i in ids).decode("utf-8", errors="replace")
        except KeyError as error:
            raise InputError(f"token {error.args[0]} is outside the tokenizer's 0 to {max(self._token_bytes)}") from error

    @functools.cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        """Bytes of every id, from the package's vocabulary file: lines of id, Python string or bytes literal, length."""
        table = {DOCUMENT_END: b""}
        for line in Path(self._encoder.vocab_filepath).read_text("utf-8").split("\n"):
            if line:
                number, literal = line.rsplit(" ", 1)[0].split(" ", 1)
                # Most literals are plain; evaluating all of them would take most of the time that a small job has.
                is_plain = literal[0] != "b" and "\\" not in literal
                token = literal[1:-1] if is_plain else ast.literal_eval(literal)
                table[int(number)] = token.encode() if isinstance(token, str) else token
        return table
