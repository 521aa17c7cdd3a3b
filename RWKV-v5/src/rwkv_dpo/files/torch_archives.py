"""What torch.save writes, taken apart without torch: the pickle of its content, looked through first, and the bytes of its storages.

Since torch 1.6 a zip archive whose members are not compressed: NAME/data.pkl, NAME/byteorder, and NAME/data/KEY for each storage.
Before, and still with _use_new_zipfile_serialization=False, five pickles in a row (a magic number, a version, facts of the system, the
content, the keys of the storages), then for each key an int64, how many numbers the storage has, and the numbers, little-endian.
"""

import io
import mmap
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

from rwkv_dpo.files.pickles import scan_pickle

Content = bytes | mmap.mmap

_MAGIC = re.compile(rb"(?s)\x80.(\x95.{8})?\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.")
# What builds plain values, and nothing that looks a name up or calls.
_PLAIN = frozenset(
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.name not in (
        "GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID",
    )
)  # fmt: skip
# What a list of texts needs. A dictionary could be made to take quadratic time.
_KEYS = _PLAIN - {"DICT", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET", "BYTEARRAY8"}


def is_archive(content: Content) -> bool:
    """By its first bytes: an archive of either form."""
    return content[:4] == b"PK\3\4" or _MAGIC.match(content) is not None


class TorchArchive:
    """`pickled`: the pickle of the content; `names`: what it names ("module.name" of its GLOBAL opcodes)."""

    pickled: bytes
    names: set[str]
    is_big_endian = False

    def storages(self, itemsizes: Mapping[str, int]) -> dict[str, memoryview]:
        """The bytes of the storages, by their keys, whose numbers have so many bytes each. They are part of the content that the
        archive was opened on. ValueError when one is missing or truncated."""
        raise NotImplementedError


def open_archive(content: Content, accepted: frozenset[str]) -> TorchArchive:
    """Takes apart what torch.save wrote. ValueError or zipfile.BadZipFile when it is truncated, its members are compressed or larger than
    it, or its pickle has opcodes that are not accepted or asks for more than it holds."""
    return _Zip(content, accepted) if content[:4] == b"PK\3\4" else _Legacy(content, accepted)


class _Zip(TorchArchive):
    def __init__(self, content: Content, accepted: frozenset[str]) -> None:
        self._content = content
        with zipfile.ZipFile(content if isinstance(content, mmap.mmap) else io.BytesIO(content)) as archive:  # type: ignore[arg-type]
            self._members = {member.filename: member for member in archive.infolist()}
        for member in self._members.values():
            is_stored = member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
            if not is_stored or member.file_size > len(content):
                raise ValueError(f"{member.filename} is compressed, or larger than the file")
        folders = [name.removesuffix("data.pkl") for name in self._members if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise ValueError(f"{len(folders)} of its members are called data.pkl")
        (self._folder,) = folders
        self.pickled = bytes(self._member(f"{self._folder}data.pkl"))
        self.names = scan_pickle(self.pickled, 0, accepted)[1]
        self.is_big_endian = f"{self._folder}byteorder" in self._members and bytes(self._member(f"{self._folder}byteorder")) == b"big"

    def storages(self, itemsizes: Mapping[str, int]) -> dict[str, memoryview]:
        return {key: self._member(f"{self._folder}data/{key}") for key in itemsizes}

    def _member(self, name: str) -> memoryview:
        info = self._members.get(name)
        if info is None:
            raise ValueError(f"{name} is not in it")
        start = info.header_offset
        n_name, n_filler = struct.unpack_from("<HH", self._content, start + 26)
        begin = start + 30 + n_name + n_filler
        found = memoryview(self._content)[begin : begin + info.file_size]
        # torch.serialization.set_crc32_options(False) leaves zeros.
        if len(found) < info.file_size or (info.CRC and zlib.crc32(found) != info.CRC):
            raise ValueError(f"{name} does not have the bytes that were written")
        return found


class _Legacy(TorchArchive):
    def __init__(self, content: Content, accepted: frozenset[str]) -> None:
        self._content = content
        at = 0
        for _ in range(3):
            at, _ = scan_pickle(content, at, _PLAIN)
        end, self.names = scan_pickle(content, at, accepted)
        self.pickled = content[at:end]
        self._storages_at, _ = scan_pickle(content, end, _KEYS)
        self._keys = content[end : self._storages_at]

    def storages(self, itemsizes: Mapping[str, int]) -> dict[str, memoryview]:
        found, at = {}, self._storages_at
        for key in _PlainUnpickler(io.BytesIO(self._keys)).load():
            if key not in itemsizes:
                raise ValueError(f"nothing in it is in storage {key}")
            n = int.from_bytes(self._content[at : at + 8], "little", signed=True)
            end = at + 8 + n * itemsizes[key]
            if not at + 8 <= end <= len(self._content):
                raise ValueError(f"storage {key} is larger than what is left")
            found[key], at = memoryview(self._content)[at + 8 : end], end
        return found


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it names {module}.{name}")
