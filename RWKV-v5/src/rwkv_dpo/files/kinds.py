"""What a file is, told by its first bytes, so that a reader that wants another kind can say what it was given and what takes that."""

import json
import os
import re
import shlex
from collections.abc import Collection
from enum import Enum
from pathlib import Path

from rwkv_dpo.base.errors import reading, refuse

_HEAD = 4096
_FETCH = "the download was answered by a page; on Hugging Face a file itself is at .../resolve/main/NAME, not .../blob/main/NAME"
_ROWS = "preferences become pairs by prepare_pairs.py --source {path} --load_model BASE.pth, texts a corpus by make_data.py {path}"


class Kind(Enum):
    """What the file is, and what to do with it."""

    def __init__(self, words: str, use: str) -> None:
        self.words, self.use = words, use

    EMPTY = "an empty file", "it was not written, or not downloaded"
    ZEROS = "a file of zeros", "it was not downloaded to its end; its size alone is right"
    LFS_POINTER = "a Git LFS pointer, which stands for the file", "git lfs pull fetches the file itself"
    WEB_PAGE = "a web page (HTML or XML)", _FETCH
    JSON_LINES = "JSON lines", _ROWS
    JSON = "JSON", _ROWS
    CSV = "CSV", _ROWS
    PARQUET = "parquet", _ROWS
    GZIP = "packed by gzip", "gunzip unpacks it; rows of preferences or texts are also read as they are (such as .jsonl.gz)"
    PACKED = "a packed file", "unpack it first; rows of preferences or texts are also read as they are from .zst, .bz2 and .xz"
    TEXT = "plain text", "make_data.py {path} makes a corpus of it"
    BINIDX = "a binidx corpus", "--data_file takes it"
    NUMPY = "a NumPy array", "--data_file takes a corpus that is stored so"
    SAFETENSORS = "safetensors", "--load_model takes a checkpoint that is stored so"
    GGUF = "a GGUF file", "it was converted for inference; the .pth that it was made of is needed"
    PAIRS = "a pair file", "--dpo_train_file takes it"
    TORCH_LIST = "a list that torch.save wrote, as the original's pair files are", "--dpo_train_file takes pairs"
    TORCH_DICT = "a dictionary that torch.save wrote, as checkpoints are", "--load_model takes a checkpoint"
    TORCH = "an object that torch.save wrote", "checkpoints are dictionaries of weights, pair files lists"
    PICKLE = "a Python pickle", "the original's pair files may be one; checkpoints are written by torch.save"
    ZIP = "a zip archive", "unzip unpacks it"


def kind_of(path: str | Path) -> Kind | None:
    """None when the first bytes don't tell. InputError when they cannot be read."""
    path = Path(path)
    with reading(path), open(path, "rb") as file:
        head = file.read(_HEAD)
        file.seek(-1 if head else 0, os.SEEK_END)
        end = file.read(1)
    if not head.strip(b"\0"):
        return Kind.ZEROS if head else Kind.EMPTY
    for kind, pattern in _BEGINNINGS:
        if pattern.match(head):
            return kind
    if head.startswith(b"PK\3\4"):
        return _kind_of_archive(head)
    if pickled := _LEGACY_TORCH.match(head):
        return _kind_of_pickled(head[pickled.end() :])
    if re.match(rb"\x80[\2-\5]", head) and end == b".":
        return Kind.PICKLE
    if path.suffix == ".bin" and path.with_suffix(".idx").is_file():
        return Kind.BINIDX
    return _kind_of_text(head, path) if _is_text(head) else None


def refuse_others(path: str | Path, wanted: str, accepted: Collection[Kind]) -> None:
    """InputError for a file that is told to be of another kind: what it is in place of what is `wanted`, and what takes it."""
    kind = kind_of(path)
    if kind is not None and kind not in accepted:
        refuse(f"{path}: not {wanted} but {kind.words}; {kind.use.format(path=shlex.quote(str(path)))}")


# The magic number, protocol version and system facts that torch.save wrote before its archives.
_LEGACY_TORCH = re.compile(rb"(?s).{0,11}\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\..{0,11}M\xe9\x03\..{0,600}?uu?\.(?=\x80|\(|\])")
_BEGINNINGS = tuple(
    (kind, re.compile(rb"(?si)" + pattern))
    for kind, pattern in (
        (Kind.LFS_POINTER, rb"version https://git-lfs\.github\.com/"),
        (Kind.WEB_PAGE, rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)"),
        (Kind.PARQUET, rb"PAR1"),
        (Kind.GZIP, rb"\x1f\x8b"),
        (Kind.PACKED, rb"BZh[1-9]|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!|.{257}ustar"),
        (Kind.BINIDX, rb"MMIDIDX\0"),
        (Kind.NUMPY, rb"\x93NUMPY"),
        (Kind.GGUF, rb"GGUF"),
        (Kind.SAFETENSORS, rb".{4}\0{4}\{"),
    )
)
_PROTOCOL_0 = re.compile(rb"\([ldt]p?\d*\n|\([ld]\(|\(\([ld]p?\d*\n")


def _kind_of_archive(head: bytes) -> Kind:
    """By its first member: a name, something that fills up, then the content."""
    n_name, n_filler = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
    name, content = head[30 : 30 + n_name], head[30 + n_name + n_filler :]
    if name.endswith(b"/data.pkl"):
        return _kind_of_pickled(content)
    return Kind.PAIRS if name == b"header.npy" else Kind.ZIP


def _kind_of_pickled(pickled: bytes) -> Kind:
    """What torch.save was given, by the first opcodes after the protocol."""
    content = re.sub(rb"^(?s:\x80.(\x95.{8})?)", b"", pickled)
    if re.match(rb"\}|ccollections\nOrderedDict\n|\x8c\x0bcollections|\(d", content):
        return Kind.TORCH_DICT
    return Kind.TORCH_LIST if content[:1] in (b"]", b"(", b")") else Kind.TORCH


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        # The head may end within a character.
        if len(head) < _HEAD or error.start < len(head) - 3:
            return False
        text = head[: error.start].decode()
    return re.search(r"[\0-\x08\x0e-\x1f]", text) is None


def _kind_of_text(head: bytes, path: Path) -> Kind | None:
    content = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if _PROTOCOL_0.match(content):
        return Kind.PICKLE
    if re.match(rb"""\{\s*["}]|\[\s*["{\]]""", content):
        line, _, rest = content.partition(b"\n")
        is_whole = content.startswith(b"{") and rest.strip() != b"" and _is_json(line)
        return Kind.JSON_LINES if is_whole or path.suffix.lower() == ".jsonl" else Kind.JSON
    return Kind.CSV if path.suffix.lower() in (".csv", ".tsv") else Kind.TEXT


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
