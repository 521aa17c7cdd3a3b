"""Documents to train on: the texts of files, folders, globs or a Hub data set, as one stream."""

from collections.abc import Iterator
from pathlib import Path

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.chat_documents import document_of
from rwkv_dpo.data.files import expand, open_rows
from rwkv_dpo.data.hub import is_hub_id, open_hub_rows
from rwkv_dpo.data.text_files import ROW_ENDINGS, OnFault, Reading, Row, ending, open_lines, read_text, stop

TEXT_ENDINGS = (".txt", *ROW_ENDINGS)


def open_documents(
    source: str,
    field: str = "",
    split_blank_lines: bool = False,
    hub_split: str = "train",
    on_fault: OnFault = stop,
    encoding: str = "utf-8",
) -> Iterator[str]:
    """The non-empty texts of `source` in order. source: a .txt file (one document, or several separated by blank lines if split), a file of
    rows (the texts in `field`; if that is empty, in 'text' or in chat data, see chat_documents.py), either also compressed, a folder or a
    glob of those, or a Hub id, of which `hub_split` is read. `encoding`: of texts without a byte order mark.

    A row without such a text goes to `on_fault`, and is skipped if that returns; any other error is an InputError.
    """
    if is_hub_id(source, TEXT_ENDINGS):
        texts = _fields(source, open_hub_rows(source, hub_split), field, on_fault)
    else:
        reading = Reading(on_fault, encoding)
        texts = (text for path in expand(source, TEXT_ENDINGS) for text in _file(path, field, split_blank_lines, reading))
    return filter(None, texts)


def _file(path: Path, field: str, split_blank_lines: bool, reading: Reading) -> Iterator[str]:
    if ending(path) == ".txt":
        yield from _paragraphs(path, reading.encoding) if split_blank_lines else [read_text(path, reading.encoding)]
    elif ending(path) in ROW_ENDINGS:
        yield from _fields(str(path), open_rows(path, *reading), field, reading.on_fault)
    else:
        refuse(f"{path}: documents are read from {', '.join(TEXT_ENDINGS)} files, also compressed")


def _fields(source: str, rows: Iterator[tuple[str, Row]], field: str, on_fault: OnFault) -> Iterator[str]:
    for where, row in rows:
        try:
            text = document_of(row, field, f"{source}: {where}")
        except InputError as fault:
            on_fault(fault)
        else:
            yield text


def _paragraphs(path: Path, encoding: str) -> Iterator[str]:
    lines: list[str] = []
    for _, line in open_lines(path, encoding=encoding):
        if line.strip():
            lines.append(line.rstrip("\r\n"))
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)
