"""Rows of .parquet files and of Arrow's own .arrow files and streams, in the layout of `datasets`, a few at a time."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rwkv_dpo.base.errors import InputError
from rwkv_dpo.base.libraries import check_package
from rwkv_dpo.data.parquet_pages import largest_pages
from rwkv_dpo.data.text_files import Reading, opened
from rwkv_dpo.data.unpacking import BLOCK, LARGEST_RATIO

PARQUET, ARROW_FILE = b"PAR1", b"ARROW1"


# Bytes of the columns' pages that are unpacked at once. Programs write pages of a megabyte, some of a hundred.
LARGEST_PAGES = 128 << 20
# Bytes in a batch of rows, and the maximum number of rows: Python's objects are larger than Arrow's.
_BATCH, _ROWS = 64 << 20, 256


def parquet_rows(path: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
    """("row 7", row) for every row. A file whose pages are built to exhaust memory is an InputError; a text that repeats often is not."""
    check_package("pyarrow", str(path))
    # Here, not above: the import is slow, and most files are not parquet.
    from pyarrow import parquet

    with _seekable(path) as file, _counted(path, ".parquet") as n:
        # First, because pyarrow learns a page's size only as it unpacks it.
        pages = largest_pages(file)
        if pages.size > max(LARGEST_PAGES, LARGEST_RATIO * path.stat().st_size):
            raise ValueError(f"its pages unpack to {pages.size} bytes, more than {LARGEST_RATIO} times its size")
        file.seek(0)
        table = parquet.ParquetFile(file, pre_buffer=False)
        # Each row may repeat a text that a dictionary holds once.
        n_rows = max(min(_BATCH // max(pages.dictionaries, 1), _ROWS), 1)
        # Not column by column from here on: pyarrow ends the whole process when it asks for the statistics of a broken column.
        for batch in table.iter_batches(batch_size=n_rows, use_threads=False):
            for row in batch.to_pylist():
                n[0] += 1
                yield f"row {n[0]}", row


def arrow_rows(path: Path, reading: Reading) -> Iterator[tuple[str, Any]]:
    """("row 7", row) for every row of an Arrow file or stream."""
    check_package("pyarrow", str(path))
    import pyarrow

    with _seekable(path) as file, _counted(path, ".arrow") as n:
        is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
        file.seek(0)
        if is_file:
            batches = pyarrow.ipc.open_file(file)
            read = (batches.get_batch(i) for i in range(batches.num_record_batches))
        else:
            read = iter(pyarrow.ipc.open_stream(file))
        for batch in read:
            # The offsets of a broken file point outside its memory.
            batch.validate(full=True)
            for at in range(0, len(batch), _ROWS):
                for row in batch.slice(at, _ROWS).to_pylist():
                    n[0] += 1
                    yield f"row {n[0]}", row


@contextlib.contextmanager
def _counted(path: Path, kind: str) -> Iterator[list[int]]:
    """A one-element list, the number of rows read; any error within becomes an InputError that names it."""
    n = [0]
    try:
        yield n
    except (InputError, GeneratorExit):
        raise
    # pyarrow, and the Python objects that it makes of dates and decimals, may raise any exception.
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: not an intact {kind} file, after row {n[0]}: {reason}") from error


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[BinaryIO]:
    """The content as a seekable file: at the start of a compressed stream, its end is not known yet."""
    with opened(path) as content:
        if content.seekable():
            yield content
            return
        with tempfile.TemporaryFile() as unpacked:
            shutil.copyfileobj(content, unpacked, BLOCK)
            unpacked.seek(0)
            yield unpacked  # type: ignore[misc]
