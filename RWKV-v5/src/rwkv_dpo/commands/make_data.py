"""Make a binidx corpus (PREFIX.bin, PREFIX.idx) from text, in RWKV World tokens.

    %(prog)s demo.jsonl 3 4096     three passes over the documents, each newly shuffled; magic_prime for --ctx_len 4096

Rows of chat data (messages or conversations; instruction, prompt or question with output, response, completion or answer) are written
as User: and Assistant: turns. Every document ends with token 0. While it works, it takes as much disk again as one pass, beside the corpus.
"""

import argparse
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.base.parser import OneLineParser
from rwkv_dpo.base.script import run_script
from rwkv_dpo.batches.sampling import item_at, largest_magic_prime
from rwkv_dpo.data.binidx import read_binidx, write_binidx
from rwkv_dpo.data.documents import TEXT_ENDINGS, open_documents
from rwkv_dpo.data.spool import Spool, open_spool
from rwkv_dpo.data.text_files import check_encoding, stop
from rwkv_dpo.data.tokenizer import DOCUMENT_END, WorldTokenizer
from rwkv_dpo.data.unpacking import unpacked_name


def run(arguments: Sequence[str]) -> NoReturn:
    """Runs the command, and ends the process with its status."""
    run_script(lambda: main(arguments))


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises InputError."""
    args = parse_flags(arguments)
    skip = Skip()
    on_fault = stop if args.on_error == "stop" else skip
    texts = FirstAndLast(open_documents(args.input, args.field, args.split_blank_lines, args.split, on_fault, args.encoding))
    with open_spool(f"{args.out}.bin", texts) as spool:
        if not len(spool):
            refuse(f"{args.input}: no document with text in it")
        passes = ShuffledPasses(spool, args.passes, args.seed)
        n_documents, n_tokens = write_binidx(args.out, passes)
    verify(args.out, {passes.first_at: texts.first, passes.last_at: texts.last})
    print(f"{args.out}.bin, {args.out}.idx: {n_documents} documents, {n_tokens} tokens in {args.passes} passes of {passes.n}")
    if skip.n:
        print(f"{skip.n} rows skipped")
    print("\n".join(flags_of(n_tokens, args.ctx_len)))


def build_parser() -> OneLineParser:
    """The flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = f"{', '.join(TEXT_ENDINGS)}, also compressed; a folder or a 'glob' of those; or a Hub id, OWNER/NAME"
    parser.add_argument("input", metavar="INPUT", help=kinds)
    parser.add_argument("passes", metavar="PASSES", type=int, nargs="?", default=1, help="how often each document is written (1)")
    parser.add_argument("ctx_len", metavar="CTX_LEN", type=int, nargs="?", default=4096, help="window size, for magic_prime (4096)")
    parser.add_argument("--out", metavar="PREFIX", help="where to write (default: INPUT's name, in the current folder)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffles (0)")
    parser.add_argument("--field", default="", help="field of a row that holds the text (text, or else chat columns)")
    parser.add_argument("--split_blank_lines", action="store_true", help="a blank line in a .txt ends a document")
    parser.add_argument("--split", default="train", help="split of a Hub data set (train)")
    parser.add_argument("--encoding", default="utf-8", help="encoding of texts without a byte order mark: cp1252, gb18030, ... (utf-8)")
    parser.add_argument("--on_error", choices=("stop", "skip"), default="stop", help="what to do at a row that cannot be read (stop)")
    return parser


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked command line. Raises InputError."""
    args = build_parser().parse_args(arguments)
    if args.passes < 1 or args.ctx_len < 1:
        refuse(f"PASSES {args.passes}, CTX_LEN {args.ctx_len}: both are at least 1")
    check_encoding(args.encoding)
    args.out = args.out or default_prefix(args.input)
    return args


def default_prefix(source: str) -> str:
    """The name that the files get without --out: that of INPUT."""
    if glob.has_magic(source) and not os.path.exists(source):
        refuse(f"--out: needed, because INPUT is the pattern {source}")
    name = Path(source).resolve().name
    return name if os.path.isdir(source) else Path(unpacked_name(name)).stem


class Skip:
    """Report and count the rows that are skipped."""

    n = 0

    def __call__(self, fault: InputError) -> None:
        """Count and name a faulty row."""
        self.n += 1
        print(f"skipped: {fault}", file=sys.stderr)


class FirstAndLast:
    """Pass texts through; afterwards, `first` and `last` are the first and the last of them."""

    first = last = ""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.first = self.first or text
            self.last = text
            yield text


class ShuffledPasses:
    """Every document of a spool once per pass, in a new order for each pass; afterwards, `first_at` and `last_at` are the positions of
    the spool's first and last document in the last pass."""

    first_at = last_at = 0

    def __init__(self, spool: Spool, n_passes: int, seed: int) -> None:
        self.n = len(spool)
        self._spool, self._n_passes, self._seed = spool, n_passes, seed

    def __iter__(self) -> Iterator[np.ndarray]:
        for index in range(self._n_passes * self.n):
            item = item_at(index, self.n, self._seed)
            self.first_at = index if item == 0 else self.first_at
            self.last_at = index if item == self.n - 1 else self.last_at
            yield self._spool[item]


def verify(prefix: str, texts: dict[int, str]) -> None:
    """Read the corpus back: document i has to decode to texts[i]."""
    corpus, tokenizer = read_binidx(prefix), WorldTokenizer()
    for i, text in texts.items():
        tokens = corpus.document(i).tolist()
        if tokens[-1] != DOCUMENT_END or tokenizer.decode(tokens) != text:
            refuse(f"{prefix}.bin: document {i + 1} reads back as a different text: a fault of the disk or of the tokenizer")


def flags_of(n_tokens: int, ctx_len: int) -> list[str]:
    """Lines: the flags of train.py for this corpus, and why some are missing."""
    try:
        return [f"--my_exit_tokens {n_tokens} --magic_prime {largest_magic_prime(n_tokens, ctx_len)} --ctx_len {ctx_len}"]
    except InputError:
        n_windows = n_tokens // ctx_len
    if n_tokens <= ctx_len:
        return [f"{n_tokens} tokens are less than one window of {ctx_len}: use train.py with --ctx_len {n_tokens - 1} or less"]
    return [
        f"--my_exit_tokens {n_tokens} --ctx_len {ctx_len}",
        f"no --magic_prime: it needs at least 3 windows, and there are {n_windows} of {ctx_len} tokens",
    ]
