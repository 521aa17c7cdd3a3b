"""Stand-ins for the tensors and arrays of a pickle: they remember what they are made of, and make nothing of it before they are asked."""

import math
from typing import Any

import numpy as np

from rwkv_dpo.base.errors import refuse

_MAX_DIMENSIONS = 8


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


class Storage:
    """The numbers that tensors are parts of. kind: numpy's name of their type without the byte order, or bfloat16."""

    __slots__ = ("content", "kind", "order")

    def __init__(self, kind: str) -> None:
        self.kind, self.content, self.order = kind, memoryview(b""), "<"

    @property
    def itemsize(self) -> int:
        """Bytes a number."""
        return np.dtype(_RAW.get(self.kind, self.kind)).itemsize

    def opened(self) -> "Storage":
        """The storage itself."""
        return self


class Tensor(Numbers):
    """A part of a storage, as torch describes it: offset and strides are in numbers."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_unused: object, kind: str = "") -> None:
        super().__init__(shape)
        self.offset, *self.strides = _dimensions((offset, *_dimensions(strides)))
        if not isinstance(storage, Storage) or len(self.strides) != len(self.shape):
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
        return (part.astype(np.uint32) << 16).view(np.float32) if kind == BFLOAT16 else part


class Array(Numbers):
    """numpy's ndarray: made empty, then given its state."""

    def __init__(self, *_unused: object) -> None:
        super().__init__((0,))
        self.kind, self.content = "", b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, _, self.content = state
        super().__init__(shape)
        self.kind = dtype.full_name

    def _array(self) -> np.ndarray:
        return np.frombuffer(to_bytes(self.content, self.n * np.dtype(self.kind).itemsize), self.kind)


def array_of(content: Any, dtype: Any, shape: Any, *_unused: object) -> Array:
    """What numpy's _frombuffer would make."""
    array = Array()
    array.__setstate__((0, shape, dtype, False, content))
    return array


class Dtype:
    """numpy's dtype: remembers its name and whether it is stored the other way round."""

    def __init__(self, name: Any, *_unused: object) -> None:
        self.name, self.order = name, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"

    @property
    def full_name(self) -> str:
        """numpy's name of the type, with the byte order. Refuses types that are no numbers."""
        return self.order + self.name if self.name[0] in "iuf" else refuse(f"carries a numpy {self.name}; expected numbers")


class Text:
    """Bytes, as protocols below 3 have them: a text whose characters are their numbers."""

    __slots__ = ("text",)

    def __init__(self, text: Any, _encoding: object) -> None:
        self.text = text


def to_bytes(content: Any, n: int | None = None) -> bytes:
    """ValueError unless they are n."""
    held = content.text if isinstance(content, Text) else content
    if n is not None and len(held) != n:
        raise ValueError("an array with other than the numbers of its shape")
    return held.encode("latin1") if isinstance(held, str) else bytes(held)


def no_bytes(*arguments: object) -> bytes:
    """How protocol 2 spells b""."""
    return refuse("carries code (bytes of a number)") if arguments else b""


def scalar(dtype: Dtype, content: Any) -> int | float:
    """A number of numpy."""
    return np.frombuffer(to_bytes(content, np.dtype(dtype.full_name).itemsize), dtype.full_name)[0].item()


def tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_unused: object) -> Tensor:
    """What torch makes of tensors whose type is not that of their storage."""
    return Tensor(storage, offset, shape, strides, kind=dtype)


BFLOAT16 = "bfloat16"


_RAW = {BFLOAT16: "u2"}
