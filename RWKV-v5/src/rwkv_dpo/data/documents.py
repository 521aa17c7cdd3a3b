"""Documents to train on: the texts of files, folders, globs or a Hub data set, one after the other as a stream."""

from collections.abc import Iterator
from pathlib import Path

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.data.files import expand, open_rows, text_field
from rwkv_dpo.data.hub import is_hub_id, open_hub_rows
from rwkv_dpo.data.text_files import ROW_ENDINGS, OnFault, Row, ending, open_lines, read_text, stop

TEXT_ENDINGS = (".txt", *ROW_ENDINGS)


def open_documents(
    source: str, field: str = "text", split_blank_lines: bool = False, hub_split: str = "train", on_fault: OnFault = stop
) -> Iterator[str]:
    """The texts of `source` in order, empty ones left out.

    source: a .txt file (one document, or as many as blank lines part when split), a .jsonl, .json, .parquet or .csv file (the
    texts in `field`), each also as .gz, a folder or a glob of those, or a Hub id, of which `hub_split` is read.

    A row without such a text goes to `on_fault`, and is left out if that returns; any other fault is an InputError.
    """
    if is_hub_id(source, TEXT_ENDINGS):
        texts = _fields(source, open_hub_rows(source, hub_split), field, on_fault)
    else:
        texts = (text for path in expand(source, TEXT_ENDINGS) for text in _file(path, field, split_blank_lines, on_fault))
    return filter(None, texts)


def _file(path: Path, field: str, split_blank_lines: bool, on_fault: OnFault) -> Iterator[str]:
    if ending(path) == ".txt":
        yield from _paragraphs(path) if split_blank_lines else [read_text(path)]
    elif ending(path) in ROW_ENDINGS:
        yield from _fields(str(path), open_rows(path, on_fault), field, on_fault)
    else:
        refuse(f"{path}: documents are read from {', '.join(TEXT_ENDINGS)} files, also with .gz")


def _fields(source: str, rows: Iterator[tuple[str, Row]], field: str, on_fault: OnFault) -> Iterator[str]:
    for where, row in rows:
        try:
            text = text_field(row, field, f"{source}: {where}")
        except InputError as fault:
            on_fault(fault)
        else:
            yield text


def _paragraphs(path: Path) -> Iterator[str]:
    lines: list[str] = []
    for _, line in open_lines(path):
        if line.strip():
            lines.append(line.rstrip("\r\n"))
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)
