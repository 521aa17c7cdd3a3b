"""Write plain checkpoints: merge adapters, and convert between .pth and .safetensors and between types.

    %(prog)s --load_model base.pth --peft_load out/adapter-final --out merged.pth --dtype bf16
    %(prog)s --load_model base.pth --out base.safetensors
    %(prog)s --load_model base.pth --peft_load out/state-final.pth --out state.pth --dtype bf16

The logits of the new file are compared with the original's; a file that differs by more than rounding is not kept.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.base.parser import OneLineParser
from rwkv_dpo.base.script import run_script
from rwkv_dpo.files.hub import local_file

FORMS = (".pth", ".safetensors")


def run(arguments: Sequence[str]) -> NoReturn:
    """Runs the command, and ends the process with its status."""
    run_script(lambda: main(arguments))


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises InputError."""
    args = parse_flags(arguments)
    if args.out.suffix not in FORMS:
        refuse(f"--out {args.out}: names that end in {' or '.join(FORMS)} are accepted")
    if args.out.exists() and not args.overwrite:
        refuse(f"--out {args.out}: exists; --overwrite 1 replaces it")
    checkpoint = local_file("--load_model", args.load_model)
    from rwkv_dpo.tuning.export import DTYPES, export  # torch takes seconds; --help and typing errors don't wait

    difference = export(checkpoint, args.peft_load, args.out, DTYPES[args.dtype], args.wkv_backend, args.any_base == 1)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:,.0f} MB, {args.dtype}); relative difference of logits {difference:.1e}")


def build_parser() -> OneLineParser:
    """The flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_model", required=True, help="checkpoint, .pth or .safetensors")
    parser.add_argument("--peft_load", default="", help="adapter folder to merge, or state file to convert")
    parser.add_argument("--out", type=Path, required=True, help="file to write; its ending determines the format")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="type of the weights (fp32)")
    parser.add_argument("--any_base", type=int, choices=(0, 1), default=0, help="1: accept an adapter of another base model (0)")
    parser.add_argument("--overwrite", type=int, choices=(0, 1), default=0, help="1: replace an existing file (0)")
    parser.add_argument("--wkv_backend", default="auto", help="auto, reference, chunked or cpu (auto)")
    return parser


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises InputError."""
    return build_parser().parse_args(arguments)
