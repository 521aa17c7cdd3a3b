"""Files of text, also packed: decoded, whole or line by line. UTF-8, UTF-16 or UTF-32 where a byte order mark says so, or the
encoding that the user names; lines end with "\\n", "\\r\\n" or, in files without any "\\n", "\\r"."""

import codecs
import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.unpacking import BLOCK, opened_bytes, unpacked_name
from rwkv_dpo.files.kinds import Kind, refuse_others

Row = dict[str, Any]
OnFault = Callable[[InputError], None]
ROW_ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv")
# All but what comes in a file's place when a download goes wrong.
_FILES = frozenset(Kind) - {Kind.LFS_POINTER, Kind.WEB_PAGE}


def stop(fault: InputError) -> NoReturn:
    """The strict answer to a faulty row."""
    raise fault


class Reading(NamedTuple):
    """How rows are read: what becomes of a faulty one, the encoding of texts without a byte order mark, and of a file that holds
    several splits the one that is wanted (empty: all)."""

    on_fault: OnFault = stop
    encoding: str = "utf-8"
    split: str = ""


# UTF-32 before UTF-16, whose mark it begins with.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Bytes that tell how rows are written.
_BEGINNING = 1 << 18
# Encodings of Python's that are no one's files, and run into surprises.
_NO_CHARSETS = ("idna", "punycode", "undefined", "unicode_escape", "raw_unicode_escape", "mbcs", "oem")


def ending(path: str | Path) -> str:
    """What kind of file it is, by its name: ".jsonl" of "a.JSONL" and of "a.jsonl.gz"."""
    return Path(unpacked_name(path).lower()).suffix


def check_encoding(name: str) -> None:
    """Refuses what is not the name of an encoding of text, for --encoding."""
    try:
        codec = codecs.lookup(name)
        is_text = codec._is_text_encoding and codec.name.replace("-", "_") not in _NO_CHARSETS
    except (LookupError, ValueError):
        is_text = False
    if not is_text:
        refuse(f"--encoding {name}: no encoding of texts that Python knows, as utf-16-le, cp1252, gb18030 and shift_jis are")


def open_lines(path: str | Path, on_fault: OnFault = stop, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """("line 7", text) of every line, its end included. A line that cannot be decoded goes to `on_fault`; in files of UTF-16 and its
    like, and where lines end with "\\r", it is an InputError."""
    with opened(Path(path)) as file:
        codec, _ = _codec(file, encoding)
        end = _line_end(file, codec)
        if end == "\n" and "\n".encode(codec) == b"\n":
            yield from _decoded(file, path, codec, on_fault)
            return
        i = 0
        text = io.TextIOWrapper(file, codec, newline=end)
        try:
            for i, line in enumerate(text, start=1):
                yield f"line {i}", line.replace("\r", "\n") if end == "\r" else line
        except UnicodeError as error:
            raise InputError(f"{path}: line {i + 1}, or further down: {_reason(error, codec)}") from error
        finally:
            text.detach()


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """The whole text of a file; every form of line end becomes "\\n"."""
    return "".join(text_blocks(Path(path), encoding))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked; what came in its place, and faults in reading it, are InputErrors."""
    refuse_others(path, f"a {ending(path)} file", _FILES if ending(path) in ROW_ENDINGS else _FILES | {Kind.WEB_PAGE})
    with opened_bytes(path) as file:
        yield file


def beginning(path: Path, encoding: str) -> tuple[str, bool]:
    """How the text of a file begins, whatever can't be decoded in it, and whether that is all of it."""
    blocks = text_blocks(path, encoding, "replace", _BEGINNING)
    return next(blocks, ""), not next(blocks, "")


def text_blocks(path: Path, encoding: str = "utf-8", errors: str = "strict", size: int = 0) -> Iterator[str]:
    """The text of a file in parts of `size` bytes, about a megabyte when it is 0; every form of line end becomes "\\n"."""
    with opened(path) as file:
        codec, n_read = _codec(file, encoding)
        bytes_decoder = codecs.getincrementaldecoder(codec)(errors)
        decoder = io.IncrementalNewlineDecoder(bytes_decoder, translate=True)
        while True:
            block = file.read(size or BLOCK)
            n_pending = len(bytes_decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeError as error:
                at = n_read - n_pending + getattr(error, "start", 0)
                raise InputError(f"{path}: {_reason(error, codec, at)}") from error
            n_read += len(block)
            if text:
                yield text
            if not block:
                return


def _codec(file: BinaryIO, encoding: str) -> tuple[str, int]:
    """The encoding that a byte order mark tells, which is taken off the file, or else that one; and how long the mark was."""
    head = file.peek(4)  # type: ignore[attr-defined]  # both kinds of file of `opened` have it
    for mark, codec in _MARKS:
        if head.startswith(mark):
            file.read(len(mark))
            return codec, len(mark)
    return codecs.lookup(encoding).name, 0


def _line_end(file: BinaryIO, codec: str) -> str:
    head = file.peek(BLOCK)  # type: ignore[attr-defined]
    if b"\n" in head and "\n".encode(codec) == b"\n":
        return "\n"
    text = codecs.getincrementaldecoder(codec)("replace").decode(head)
    return "\r" if "\r" in text.removesuffix("\r") and "\n" not in text else "\n"


def _decoded(file: BinaryIO, path: str | Path, codec: str, on_fault: OnFault) -> Iterator[tuple[str, str]]:
    for i, line in enumerate(file, start=1):
        try:
            text = line.decode(codec)
        except UnicodeError as error:
            on_fault(InputError(f"{path}: line {i}: {_reason(error, codec, getattr(error, 'start', 0), 'its ')}"))
        else:
            yield f"line {i}", text


def _reason(error: UnicodeError, codec: str, at: int | None = None, whose: str = "") -> str:
    place = "" if at is None else f" at {whose}byte {at}"
    return f"not {codec.upper()}: {getattr(error, 'reason', error)}{place} (--encoding names another encoding)"
