"""Looking through a pickle before it is loaded.

An unpickler allocates what numbers in the file ask for: five bytes can ask for a memo of 2**32 entries, nine for a string of 2**63
bytes. Checked here first, loading takes memory in proportion to the file. Nothing is loaded or called.
"""

import functools
import io
import mmap
import pickle
import pickletools
import re
from typing import Any

_BY_CODE = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
# Opcodes whose argument is a number that memory is allocated by, or a name that is looked up.
_NUMBERED, _NAMING = ("PUT", "LONG_BINPUT"), ("GLOBAL",)
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4, pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}  # fmt: skip


def scan_pickle(content: bytes | mmap.mmap, at: int, accepted: frozenset[str]) -> tuple[int, set[str]]:
    """Where the pickle that begins at `at` ends, and the names ("module.name") in its GLOBAL opcodes.

    ValueError: an opcode (pickletools' names) that is not accepted, a number of the memo that is larger than the content, an
    argument longer than what is left, no end.
    """
    run, size = _plain_run(accepted), len(content)
    names: set[str] = set()
    while (at := run.match(content, at).end()) < size:  # type: ignore[union-attr]  # it matches nothing, too
        opcode = _BY_CODE.get(content[at])
        if opcode is None or opcode.name not in accepted:
            raise ValueError(f"opcode {opcode.name if opcode else content[at]} at byte {at}")
        if opcode.name == "STOP":
            return at + 1, names
        start, at = at + 1, _end_of_argument(content, at + 1, opcode)
        if at > size or at < start:
            raise ValueError(f"{opcode.name} at byte {start - 1} is longer than what is left")
        argument = content[start:at] if opcode.name in (*_NUMBERED, *_NAMING) else b""
        if opcode.name in _NAMING:
            names.add(".".join(argument.decode().split("\n")[:2]))
        elif opcode.name in _NUMBERED:
            number = int(argument) if opcode.name == "PUT" else int.from_bytes(argument, "little")
            if number > size:
                raise ValueError(f"memo number {number} at byte {start - 1}")
    raise ValueError("it has no end")


def check_copies(pickled: bytes) -> None:
    """ValueError when what the pickle gives to calls, and to objects as their state, is together more than a pickle of its size holds.

    A call may copy what it is given, and a pickle of kilobytes can give one list to it ten thousand times. The pickle is rehearsed:
    lists, dictionaries and numbers are made, nothing that it names is imported or called.
    """
    _Rehearsal(pickled).load()


class _Rehearsal(pickle.Unpickler):
    def __init__(self, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        # An element of a list or a dictionary takes two bytes or more; 64 letters of a text take the memory of one.
        self._room = len(pickled) / 2 + 1000
        give = self._give

        class Anything:
            """Whatever is named, and whatever a call of it returns: takes all that a pickle does with an object."""

            def __new__(cls, *arguments: object) -> "Anything":
                give(arguments)
                return super().__new__(cls)

            def __init__(self, *_arguments: object) -> None:
                pass

            def __setstate__(self, state: object) -> None:
                give(state if isinstance(state, tuple) else (state,))

            def __setitem__(self, name: object, value: object) -> None:
                pass

            append = extend = add = __init__

        self._anything = Anything

    def _give(self, arguments: tuple[object, ...]) -> None:
        for argument in arguments:
            if isinstance(argument, str | bytes | bytearray):
                self._room -= len(argument) / 64
            elif isinstance(argument, list | tuple | dict | set | frozenset):
                self._room -= len(argument)
        if self._room < 0:
            raise ValueError("its calls are given more than it holds")

    def find_class(self, module: str, name: str) -> Any:
        return self._anything

    def persistent_load(self, pid: Any) -> Any:
        return self._anything()


@functools.lru_cache(maxsize=4)
def _plain_run(accepted: frozenset[str]) -> re.Pattern[bytes]:
    """Matches up to a thousand accepted opcodes whose argument has a fixed size and allocates nothing: some 30 ns each, where a
    loop in Python takes a microsecond."""
    by_size: dict[int, bytes] = {}
    for code, opcode in _BY_CODE.items():
        size = opcode.arg.n if opcode.arg else 0
        if size >= 0 and opcode.name in accepted and opcode.name not in ("STOP", "FRAME", *_NUMBERED):
            by_size[size] = by_size.get(size, b"") + re.escape(bytes([code]))
    # Small numbers, most of a list of tokens, are tried first.
    sizes = sorted(by_size, key=lambda size: (size not in (1, 2), size))
    return re.compile(b"(?s:(?:" + b"|".join(b"[%b].{%d}" % (by_size[size], size) for size in sizes) + b"){0,1000})")


def _end_of_argument(content: bytes | mmap.mmap, at: int, opcode: pickletools.OpcodeInfo) -> int:
    """Byte after the opcode's argument, which begins at `at`; 0 when it does not end."""
    size = opcode.arg.n if opcode.arg else 0
    if size == pickletools.UP_TO_NEWLINE:
        for _ in range(2 if opcode.name in ("GLOBAL", "INST") else 1):
            at = content.find(b"\n", at) + 1
            if not at:
                return 0
        return at
    if size < 0:
        n_bytes = _LENGTH_BYTES[size]
        return at + n_bytes + int.from_bytes(content[at : at + n_bytes], "little")
    if opcode.name == "FRAME":
        # It goes round the opcodes that follow.
        frame = int.from_bytes(content[at : at + size], "little")
        return at + size if at + size + frame <= len(content) else 0
    return at + size
