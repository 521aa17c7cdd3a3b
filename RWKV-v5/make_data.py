#!/usr/bin/env python3
"""Make a binidx corpus (PREFIX.bin, PREFIX.idx) of text, in RWKV World tokens.

    make_data.py demo.jsonl 3 4096     three passes over the documents, each newly shuffled; magic_prime for --ctx_len 4096
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

import numpy as np
from rwkv_dpo.data.binidx import write_binidx
from rwkv_dpo.data.sources import read_documents
from rwkv_dpo.data.tokenizer import DOCUMENT_END, WorldTokenizer
from rwkv_dpo.errors import InputError, run_script
from rwkv_dpo.flags import OneLineParser
from rwkv_dpo.sampling import item_at, largest_magic_prime


def main(arguments: list[str] | None = None) -> None:
    args = parse_flags(arguments)
    documents = tokenized(args.input, args.field, args.split_blank_lines)
    n_documents, n_tokens = write_binidx(args.out, in_shuffled_passes(documents, args.passes, args.seed))
    print(f"{args.out}.bin, {args.out}.idx: {n_documents} documents, {n_tokens} tokens in {args.passes} passes of {len(documents)}")
    print(f"--my_exit_tokens {n_tokens} --magic_prime {magic_prime(n_tokens, args.ctx_len)} --ctx_len {args.ctx_len}")


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", metavar="INPUT", help=".jsonl, one document a line, or .txt, one document")
    parser.add_argument("passes", metavar="PASSES", type=int, nargs="?", default=1, help="times each document is written (1)")
    parser.add_argument("ctx_len", metavar="CTX_LEN", type=int, nargs="?", default=4096, help="for magic_prime (4096)")
    parser.add_argument("--out", metavar="PREFIX", help="where to write (default: INPUT's name, in the current folder)")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffles (0)")
    parser.add_argument("--field", default="text", help="the .jsonl field that holds the text (text)")
    parser.add_argument("--split_blank_lines", action="store_true", help="a blank line in a .txt ends a document")
    args = parser.parse_args(arguments)
    if args.passes < 1 or args.ctx_len < 1:
        raise InputError(f"PASSES {args.passes}, CTX_LEN {args.ctx_len}: both are at least 1")
    args.out = args.out or Path(args.input).stem
    return args


def tokenized(path: str, field: str, split_blank_lines: bool) -> list[np.ndarray]:
    """uint16 tokens of every document that is not empty, each closed by the document end."""
    tokenizer = WorldTokenizer()
    texts = read_documents(path, field, split_blank_lines)
    documents = [np.array([*tokenizer.encode(text), DOCUMENT_END], dtype=np.uint16) for text in texts if text]
    if not documents:
        raise InputError(f"{path}: no document with text in it")
    return documents


def in_shuffled_passes(documents: list[np.ndarray], n_passes: int, seed: int) -> Iterator[np.ndarray]:
    for index in range(n_passes * len(documents)):
        yield documents[item_at(index, len(documents), seed)]


def magic_prime(n_tokens: int, ctx_len: int) -> int:
    """0, the flag's neutral value, when the corpus is too short to have one."""
    try:
        return largest_magic_prime(n_tokens, ctx_len)
    except InputError:
        return 0


if __name__ == "__main__":
    run_script(main)
