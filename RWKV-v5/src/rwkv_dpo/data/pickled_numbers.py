"""Lists, tuples and numbers, tensors and arrays among them, out of a pickle or of what torch.save wrote; nothing is called or imported.

A pickle is a program that may call whatever it can name. Here it can name stand-ins of our own alone, which remember what they are made
of; nothing is made of that before `Numbers.array` is called, so that a small file cannot make many large tensors of a few numbers.
"""

import io
import mmap
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import InputError, reading, refuse
from rwkv_dpo.data.stored_numbers import BFLOAT16, Array, Dtype, Storage, Tensor, Text, array_of, no_bytes, scalar, tensor_v3, to_bytes
from rwkv_dpo.files.pickles import scan_pickle
from rwkv_dpo.files.torch_archives import Content, is_archive, open_archive

# Dictionaries and sets can be made to take quadratic time.
_OPCODES = frozenset(
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.name not in ("SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET", "EXT1", "EXT2", "EXT4")
)


def load_numbers(path: Path) -> Any:
    """What the file holds: lists, tuples, numbers of Python, and Numbers. InputError when it is truncated, or names anything else."""
    with reading(path), open(path, "rb") as file:
        try:
            # Numbers refer to it: it is closed with the last of them.
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if is_archive(content):
                return _load_archive(content)
            scan_pickle(content, 0, _OPCODES)
            return _Unpickler(file).load()
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        # A truncated or foreign file can fail at any opcode, and the pickle module promises no particular exception.
        except Exception as error:
            what = "it holds dictionaries" if "opcode SETITEM" in str(error) else error or type(error).__name__
            raise InputError(f"{path}: not a pair file, or a truncated one: {what}") from error


def _load_archive(content: Content) -> Any:
    archive = open_archive(content, _OPCODES)
    unpickler = _Unpickler(io.BytesIO(archive.pickled))
    loaded = unpickler.load()
    stored = archive.storages({key: storage.itemsize for key, storage in unpickler.storages.items()})
    for key, storage in unpickler.storages.items():
        storage.content, storage.order = stored[key], ">" if archive.is_big_endian else "<"
    return loaded


class _PackedStorage(Storage):
    """A storage as pickle.dump has it: what torch.save makes of it alone."""

    __slots__ = ("_loaded", "_packed")

    def __init__(self, packed: Any) -> None:
        self._packed, self._loaded = packed, None

    def opened(self) -> Storage:
        self._loaded = self._loaded or _load_archive(to_bytes(self._packed))
        return self._loaded if type(self._loaded) is Storage else refuse("a tensor without a storage")


class _Named:
    """Stands in for a function or class. A pickle may also set the state of what it can name: this has none."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: object) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: object) -> None:
        raise InputError("carries code (state for what it names)")


_STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": BFLOAT16, "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "UntypedStorage": "u1",
}  # fmt: skip
_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _Named(Tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Named(Tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Named(tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Named(lambda tensor, *_unused: tensor),
    ("torch.storage", "_load_from_bytes"): _Named(_PackedStorage),
    ("collections", "OrderedDict"): _Named(lambda *_unused: None),  # a tensor's hooks
    ("_codecs", "encode"): _Named(Text),
    **{(module, "bytes"): _Named(no_bytes) for module in ("builtins", "__builtin__")},
    ("numpy", "dtype"): _Named(Dtype),
    ("numpy", "ndarray"): _Named(Array),
    **{(module, name): kind for module in ("torch", "torch.storage", "torch.cuda") for name, kind in _STORAGES.items()},
    **{("torch", f"uint{8 * size}"): f"u{size}" for size in (2, 4, 8)},
    **{
        (f"numpy.{core}.{module}", name): _Named(make)
        for core in ("core", "_core")
        for module, name, make in (
            ("multiarray", "scalar", scalar), ("multiarray", "_reconstruct", Array), ("numeric", "_frombuffer", array_of),
        )
    },
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """`storages`: those that it met, by their keys."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise InputError(f"carries code ({module}.{name}); a pair file holds only lists, tuples and numbers, also in tensors")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        what, kind, key, _where, _n, *view = pid
        if what != "storage" or kind not in _STORAGES.values() or not isinstance(key, str) or view not in ([], [None]):
            raise ValueError("a tensor without a storage")
        storage = self.storages.setdefault(key, Storage(kind))
        if storage.kind != kind:
            raise ValueError(f"storage {key} is of two kinds")
        return storage
