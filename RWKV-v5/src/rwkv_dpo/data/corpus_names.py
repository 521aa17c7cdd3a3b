"""What --data_file names, determined from the existing files."""

import codecs
import os

import numpy as np

from rwkv_dpo.base.errors import reading, refuse


def name_corpus(data_file: str, data_type: str = "") -> tuple[str, str]:
    """--data_file and --data_type as open_corpus takes them. A type that was not given is detected from the file; a binidx corpus may be
    named with its .bin or .idx. InputError if a given type is not the file's."""
    prefix, is_file = data_file.removesuffix(".bin").removesuffix(".idx"), os.path.isfile(data_file)
    has_index = os.path.isfile(f"{prefix}.idx") and os.path.isfile(f"{prefix}.bin")
    is_binidx = has_index and (prefix != data_file or not is_file)
    if data_type == "binidx":
        if is_file and not has_index:
            refuse(f"--data_type binidx: {data_file} has no {prefix}.idx and .bin; without --data_type its type is detected")
        return prefix if is_binidx else data_file, data_type
    if data_type:
        if is_binidx and data_type != "dummy" and not (data_type == "uint16" and is_file):
            refuse(f"--data_type {data_type}: {prefix}.bin and .idx are a binidx corpus, which is detected without --data_type")
        return data_file, data_type
    if is_binidx:
        return prefix, "binidx"
    if not os.path.exists(data_file) and os.path.isfile(f"{prefix}_text_document.idx"):
        refuse(f"--data_file {data_file}: no such file; {prefix}_text_document is the corpus that json2binidx wrote")
    if is_file and prefix != data_file:
        refuse(f"{data_file}: no binidx corpus without both {prefix}.bin and .idx; --data_type uint16 takes a file of raw 16-bit tokens")
    return data_file, _text_or_array(data_file) if is_file else "utf-8"


def _text_or_array(data_file: str) -> str:
    with reading(data_file), open(data_file, "rb") as file:
        head = file.read(6)
    return "numpy" if head == np.lib.format.MAGIC_PREFIX else "utf-16le" if head.startswith(codecs.BOM_UTF16_LE) else "utf-8"
