"""Text as a corpus: through the World tokenizer, or one number a character, as the model that reads it was trained."""

import glob
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from rwkv_dpo.base.errors import reading, refuse
from rwkv_dpo.data.documents import TEXT_ENDINGS, open_documents
from rwkv_dpo.data.files import expand
from rwkv_dpo.data.spool import encode_blocks
from rwkv_dpo.data.text_files import ROW_ENDINGS, ending

# More text than this takes long seconds and gigabytes at every start of a run, on every process.
MAX_TEXT = 64 << 20


def holds_documents(data_file: str) -> bool:
    """Whether it is a folder, a pattern of files, or a file whose texts are fields of rows."""
    is_pattern = glob.has_magic(data_file) and not os.path.exists(data_file)
    return is_pattern or os.path.isdir(data_file) or ending(data_file) in ROW_ENDINGS


def documents_of(data_file: str) -> Iterator[str]:
    """The documents of a file, a folder or a pattern. InputError when they are more than MAX_TEXT."""
    check_size(data_file, sum(path.stat().st_size for path in expand(data_file, TEXT_ENDINGS)))
    n_characters = 0
    for text in open_documents(data_file):
        n_characters += len(text)
        check_size(data_file, n_characters)  # it may have been packed
        yield text


def check_size(data_file: str, size: int) -> None:
    """Refuses more text than is tokenized as a run starts. size: in bytes."""
    if size > MAX_TEXT:
        refuse(
            f"{data_file}: more text than the {MAX_TEXT >> 20} MB that are tokenized as a run starts; make_data.py does it once, on all "
            f"cores (make_data.py {data_file} 1 --out corpus), and --data_file corpus takes what it wrote"
        )


def world_tokens(texts: Iterable[str]) -> tuple[np.ndarray, int]:
    """uint16 World tokens of all documents, each closed by the document end as make_data.py does, and how many documents."""
    blocks = list(encode_blocks(texts))
    return np.frombuffer(b"".join(tokens for tokens, _ in blocks), "<u2"), sum(len(sizes) for _, sizes in blocks)


def vocabulary_of(checkpoint: str) -> tuple[Path, str]:
    """The vocab.json that training on characters leaves beside its checkpoints, and its characters, none without such a file."""
    path = Path(checkpoint).parent / "vocab.json"
    return path, read_vocabulary(path) if path.is_file() else ""


def read_vocabulary(path: Path) -> str:
    """Characters in the order of their numbers; none from a file of another kind."""
    with reading(path):
        content = path.read_bytes()
    # RWKV-LM writes UTF-16LE, editors what they like.
    for encoding in ("utf-16le", "utf-8"):
        try:
            entries = json.loads(content.decode(encoding).removeprefix("\ufeff"))
        except (ValueError, RecursionError):
            continue
        if isinstance(entries, dict) and list(entries) == [str(i) for i in range(len(entries))]:
            characters = list(entries.values())
            if all(isinstance(c, str) and len(c) == 1 for c in characters) and len(set(characters)) == len(characters):
                return "".join(characters)
    return ""


def character_tokens(text: str, characters: str, source: str, vocabulary: Path | None) -> tuple[np.ndarray, str]:
    """int32 numbers of the text's characters, and the characters by number: those of `vocabulary`, or without it all that are found,
    sorted by code point. InputError, naming `source`, for a character that has no number."""
    found, places = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"), return_inverse=True)
    if vocabulary is None:
        return places.astype(np.int32), "".join(map(chr, found))
    numbers = {character: number for number, character in enumerate(characters)}
    for character in map(chr, found):
        if character not in numbers:
            refuse(f"{source}: character {character!r} (at {text.index(character)}) is not in {vocabulary}, which numbers the model's")
    return np.array([numbers[chr(code)] for code in found], np.int32)[places], characters
