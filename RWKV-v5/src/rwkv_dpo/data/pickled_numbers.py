"""Lists, tuples and numbers, tensors and arrays among them, out of a pickle or of what torch.save wrote; nothing is called or imported.

A pickle is a program that may call whatever it can name. Here it can name stand-ins of our own alone, which remember what they are made
of; nothing is made of that before `Numbers.array` is called, so that a small file cannot make many large tensors of a few numbers.
"""

import io
import math
import mmap
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_dpo.base.errors import InputError, reading, refuse
from rwkv_dpo.files.pickles import scan_pickle
from rwkv_dpo.files.torch_archives import Content, is_archive, open_archive

# Dictionaries and sets can be made to take quadratic time.
_OPCODES = frozenset(
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.name not in ("SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET", "EXT1", "EXT2", "EXT4")
)
_MAX_DIMENSIONS = 8


def load_numbers(path: Path) -> Any:
    """What the file holds: lists, tuples, numbers of Python, and Numbers. InputError when it is torn, or names anything else."""
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
        # A torn or foreign file can fail at any opcode, and the pickle module promises no particular exception.
        except Exception as error:
            what = "it holds dictionaries" if "opcode SETITEM" in str(error) else error or type(error).__name__
            raise InputError(f"{path}: not a pair file, or a torn one: {what}") from error


def _load_archive(content: Content) -> Any:
    archive = open_archive(content, _OPCODES)
    unpickler = _Unpickler(io.BytesIO(archive.pickled))
    loaded = unpickler.load()
    stored = archive.storages({key: storage.itemsize for key, storage in unpickler.storages.items()})
    for key, storage in unpickler.storages.items():
        storage.content, storage.order = stored[key], ">" if archive.is_big_endian else "<"
    return loaded


class Numbers:
    """`n` numbers of a tensor or an array in the file."""

    def __init__(self, shape: Any) -> None:
        self.shape = _dimensions(shape)
        self.n = math.prod(self.shape)

    def array(self) -> np.ndarray:
        """[n]. ValueError when it has more than one dimension that is not 1, or its numbers are not in the file or no numbers."""
        if sum(size != 1 for size in self.shape) > 1:
            raise ValueError(f"a tensor or an array of the shape {list(self.shape)}; expected one dimension")
        return self._array()

    def _array(self) -> np.ndarray:
        raise NotImplementedError


def _dimensions(numbers: Any) -> tuple[int, ...]:
    is_sound = isinstance(numbers, tuple) and len(numbers) <= _MAX_DIMENSIONS
    if not is_sound or not all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers):
        raise ValueError("a tensor or an array without a shape")
    return numbers


class _Storage:
    """The numbers that tensors are parts of. kind: numpy's name of their type without the byte order, or bfloat16."""

    __slots__ = ("content", "kind", "order")

    def __init__(self, kind: str) -> None:
        self.kind, self.content, self.order = kind, memoryview(b""), "<"

    @property
    def itemsize(self) -> int:
        return np.dtype(_RAW.get(self.kind, self.kind)).itemsize

    def opened(self) -> "_Storage":
        return self


class _PackedStorage:
    """A storage as pickle.dump has it: what torch.save makes of it alone."""

    __slots__ = ("_loaded", "_packed")

    def __init__(self, packed: Any) -> None:
        self._packed, self._loaded = packed, None

    def opened(self) -> _Storage:
        self._loaded = self._loaded or _load_archive(_to_bytes(self._packed))
        return self._loaded if isinstance(self._loaded, _Storage) else refuse("a tensor without a storage")


class _Tensor(Numbers):
    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_unused: object, kind: str = "") -> None:
        super().__init__(shape)
        self.offset, *self.strides = _dimensions((offset, *_dimensions(strides)))
        if not isinstance(storage, _Storage | _PackedStorage) or len(self.strides) != len(self.shape):
            raise ValueError("a tensor without a storage")
        self.storage, self.kind = storage, kind

    def _array(self) -> np.ndarray:
        storage = self.storage.opened()
        kind = self.kind or storage.kind
        stored = np.frombuffer(storage.content, storage.order + _RAW.get(kind, kind))
        step = max((stride for size, stride in zip(self.shape, self.strides, strict=True) if size != 1), default=1)
        end = self.offset + max(self.n - 1, 0) * step + 1
        if end > len(stored) and self.n:
            raise ValueError("a tensor that is larger than what it is stored in")
        part = stored[self.offset : end : step] if step else np.repeat(stored[self.offset : end], self.n)
        part = part[: self.n]
        return (part.astype(np.uint32) << 16).view(np.float32) if kind == _BFLOAT16 else part


class _Array(Numbers):
    """numpy's ndarray: made empty, then given its state."""

    def __init__(self, *_unused: object) -> None:
        super().__init__((0,))
        self.kind, self.content = "", b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, _, self.content = state
        super().__init__(shape)
        self.kind = dtype.full_name

    def _array(self) -> np.ndarray:
        return np.frombuffer(_to_bytes(self.content, self.n * np.dtype(self.kind).itemsize), self.kind)


def _array_of(content: Any, dtype: Any, shape: Any, *_unused: object) -> _Array:
    array = _Array()
    array.__setstate__((0, shape, dtype, False, content))
    return array


class _Dtype:
    """numpy's dtype: remembers its name and whether it is stored the other way round."""

    def __init__(self, name: Any, *_unused: object) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"

    @property
    def full_name(self) -> str:
        return self.order + self.name if self.name[0] in "iuf" else refuse(f"carries a numpy {self.name}; expected numbers")


class _Text:
    """Bytes, as protocols below 3 have them: a text whose characters are their numbers."""

    __slots__ = ("text",)

    def __init__(self, text: Any, _encoding: object) -> None:
        self.text = text


def _to_bytes(content: Any, n: int | None = None) -> bytes:
    """ValueError unless they are n."""
    held = content.text if isinstance(content, _Text) else content
    if n is not None and len(held) != n:
        raise ValueError("an array with other than the numbers of its shape")
    return held.encode("latin1") if isinstance(held, str) else bytes(held)


def _no_bytes(*arguments: object) -> bytes:
    """How protocol 2 spells b""."""
    return refuse("carries code (bytes of a number)") if arguments else b""


def _scalar(dtype: _Dtype, content: Any) -> int | float:
    """A number of numpy."""
    return np.frombuffer(_to_bytes(content, np.dtype(dtype.full_name).itemsize), dtype.full_name)[0].item()


class _Named:
    """Stands in for a function or class. A pickle may also set the state of what it can name: this has none."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *arguments: object) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: object) -> None:
        raise InputError("carries code (state for what it names)")


def _tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_unused: object) -> _Tensor:
    return _Tensor(storage, offset, shape, strides, kind=dtype)


_BFLOAT16 = "bfloat16"
_RAW = {_BFLOAT16: "u2"}
_STORAGES = {
    "DoubleStorage": "f8", "FloatStorage": "f4", "HalfStorage": "f2", "BFloat16Storage": _BFLOAT16, "LongStorage": "i8",
    "IntStorage": "i4", "ShortStorage": "i2", "CharStorage": "i1", "ByteStorage": "u1", "UntypedStorage": "u1",
}  # fmt: skip
_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _Named(_Tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Named(_Tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Named(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Named(lambda tensor, *_unused: tensor),
    ("torch.storage", "_load_from_bytes"): _Named(_PackedStorage),
    ("collections", "OrderedDict"): _Named(lambda *_unused: None),  # a tensor's hooks
    ("_codecs", "encode"): _Named(_Text),
    **{(module, "bytes"): _Named(_no_bytes) for module in ("builtins", "__builtin__")},
    ("numpy", "dtype"): _Named(_Dtype),
    ("numpy", "ndarray"): _Named(_Array),
    **{(module, name): kind for module in ("torch", "torch.storage", "torch.cuda") for name, kind in _STORAGES.items()},
    **{("torch", f"uint{8 * size}"): f"u{size}" for size in (2, 4, 8)},
    **{
        (f"numpy.{core}.{module}", name): _Named(make)
        for core in ("core", "_core")
        for module, name, make in (
            ("multiarray", "scalar", _scalar), ("multiarray", "_reconstruct", _Array), ("numeric", "_frombuffer", _array_of),
        )
    },
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    """`storages`: those that it met, by their keys."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise InputError(f"carries code ({module}.{name}); a pair file holds only lists, tuples and numbers, also in tensors")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        what, kind, key, _where, _n, *view = pid
        if what != "storage" or kind not in _STORAGES.values() or not isinstance(key, str) or view not in ([], [None]):
            raise ValueError("a tensor without a storage")
        storage = self.storages.setdefault(key, _Storage(kind))
        if storage.kind != kind:
            raise ValueError(f"storage {key} is of two kinds")
        return storage
