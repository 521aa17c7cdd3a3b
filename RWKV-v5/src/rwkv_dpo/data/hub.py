"""Data sets of the Hugging Face Hub, read as a stream through the package `datasets`."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from rwkv_dpo.base.errors import InputError
from rwkv_dpo.base.libraries import check_package
from rwkv_dpo.data.text_files import Row, ending


def is_hub_id(source: str | Path, file_endings: tuple[str, ...]) -> bool:
    """Whether `source` reads as OWNER/NAME and is not a file, nor named like one."""
    is_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)) is not None
    return is_name and ending(source) not in file_endings and not os.path.exists(source)


def open_hub_rows(name: str, split: str) -> Iterator[tuple[str, Row]]:
    """("row 3", row) for every row of that split, counted from 1. InputError if it cannot be fetched."""
    check_package("datasets", f"{name}, which is no file or folder here,", "a file of its rows can be read without it")
    # Here, not above: it takes seconds to import, and local files don't need it.
    import datasets

    n = 0
    try:
        for n, row in enumerate(datasets.load_dataset(name, split=split, streaming=True), start=1):
            yield f"row {n}", row
    # The exceptions of `datasets` for a missing network, a missing data set, a missing split and an unreadable file.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name}: no such file or folder here, and split {split!r} of it cannot be read from the Hub after row {n}: {reason}"
        ) from error
