"""Make pair files from a preference data set: trainset.save, validset.save, testset.save, report.json and report.html.

    %(prog)s --source preferences.json --load_model base.pth --out_dir pairs --ctx_len 4096
    %(prog)s --source ours.jsonl:0.7 public.parquet:0.3 --load_model base.pth --out_dir pairs
    %(prog)s --source HuggingFaceH4/ultrafeedback_binarized --split train_prefs --limit 1000 --load_model base.pth

Scoring takes most of the time. If it is interrupted, the same command continues from reference.journal in --out_dir. Pair files made with
other flags are replaced only with --overwrite 1.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.base.parser import OneLineParser
from rwkv_dpo.base.script import run_script
from rwkv_dpo.data.columns import ROLES, parse_columns
from rwkv_dpo.data.forms import FORMS
from rwkv_dpo.data.mixtures import mixed, parse_sources, read_sources
from rwkv_dpo.data.pair_files import write_as_original, write_packed
from rwkv_dpo.data.preference import Notes
from rwkv_dpo.data.prepare import Report, prepare
from rwkv_dpo.data.prompts import load_templates
from rwkv_dpo.data.rankings import RANK_PAIRS, Pairing
from rwkv_dpo.data.sources import FORMATS, ON_ERROR, Dropped, Preference, read_preferences
from rwkv_dpo.data.splits import PAGE, file_of, identified, is_prepared, split_rows, write_splits
from rwkv_dpo.data.text_files import ROW_ENDINGS, check_encoding
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.evaluation.flags import add_quant_flag
from rwkv_dpo.files.hub import local_file
from rwkv_dpo.report.figures import lost_shares
from rwkv_dpo.report.look import look, whole_report
from rwkv_dpo.report.page import as_page
from rwkv_dpo.report.table import as_table, no_pair_of


def run(arguments: Sequence[str]) -> NoReturn:
    """Runs the command, and ends the process with its status."""
    run_script(lambda: main(arguments), stopped="the same command continues where it was")


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises InputError."""
    args = parse_flags(arguments)
    sources, columns = parse_sources(args.source), parse_columns(args.columns)
    notes, pairing = Notes(), Pairing(args.rank_pairs, args.min_gap, args.seed)

    def read(name: str) -> Iterator[Preference | Dropped]:
        return read_preferences(
            name, args.limit, args.split, args.format, args.on_error, encoding=args.encoding, columns=columns, pairing=pairing, notes=notes
        )

    tokenizer = WorldTokenizer()
    prepared = prepare(read_sources(sources, read), tokenizer, args.ctx_len, args.templates, args.seed)
    prepared, by_source = mixed(prepared, sources, args.seed)
    prepared = prepared.grown(args.tree_tokens or 4 * args.ctx_len)
    rows = split_rows(prepared.prompt_keys, args.valid_ratio, args.test_ratio, args.seed)
    counts = prepared.report.counts()
    looked = look(prepared, rows, tokenizer, args.ctx_len, args.seed) if len(prepared.pairs) else {}
    tell_dropped(prepared.report)
    print(as_table(counts=counts, looked=looked, sources=by_source), *notes.lines(), sep="\n", flush=True)
    # Here, not above: --help and a mistyped flag need no PyTorch.
    from rwkv_dpo.base.progress import Progress
    from rwkv_dpo.evaluation.reference import discard_journal, score_with_checkpoint
    from rwkv_dpo.model.checkpoint import read_checkpoint, version_of

    for line in looked["warnings"] if looked else lost_shares(counts, args.ctx_len):
        warn(line)
    if not looked:
        refuse(no_pair_of(", ".join(args.source), notes))
    for name, ratio in (("train", 1), ("valid", args.valid_ratio), ("test", args.test_ratio)):
        if ratio and not rows[name]:
            warn(f"{file_of(args.out_dir, name)} will be empty: none of the {len(set(prepared.prompt_keys))} prompts falls into it")
    if load_templates(args.templates).is_g1 and (version := version_of(read_checkpoint(args.load_model), args.load_model)) != "7":
        warn(f"--templates {args.templates} writes as RWKV-7 G1 models were trained; {args.load_model} is an RWKV-{version} checkpoint")
    unscored = identified(prepared.pairs, rows, args.load_model, args.precision, args.quant)
    if not args.overwrite and is_prepared(args.out_dir, unscored, rows, not args.original_format):
        discard_journal(args.out_dir)
        print(f"{args.out_dir} holds the pair files that these flags make; --overwrite 1 makes them again")
        return
    with Progress(len(prepared.pairs), "pair", "reference", leave=True) as progress:
        pairs = score_with_checkpoint(
            unscored, args.load_model, args.out_dir, device=args.device, precision=args.precision, batch_tokens=args.batch_tokens,
            wkv_backend=args.wkv_backend, quant=args.quant, progress=progress.update,
        )  # fmt: skip
    report = whole_report(looked, prepared, notes, by_source, pairs)
    files = write_splits(args.out_dir, pairs, rows, report, as_page, write_as_original if args.original_format else write_packed)
    print(as_table(reference=report["reference"], files=files), f"{args.out_dir / PAGE} shows them", sep="\n")
    discard_journal(args.out_dir)


def build_parser() -> OneLineParser:
    """The flags."""
    forms = "\n".join(f"  {name:<22} {form.columns} ({form.sets})" for name, form in FORMS.items())
    parser = OneLineParser(
        description=__doc__, epilog=f"forms of rows:\n{forms}", formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    kinds = f"{', '.join(ROW_ENDINGS)}, also compressed; a folder, a glob, or a Hub id; several, with shares: a.jsonl:0.7 b.parquet:0.3"
    parser.add_argument("--source", metavar="SOURCE[:SHARE]", nargs="+", required=True, help=kinds)
    parser.add_argument("--split", default="", help="split of a Hub data set (train), or of files that hold several (all)")
    parser.add_argument("--encoding", default="utf-8", help="encoding of texts without a byte order mark: cp1252, gb18030, ... (utf-8)")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="form of the rows (auto: recognized by their columns)")
    parser.add_argument(
        "--columns", default="", metavar="ROLE=COLUMN,...", help=f"column names by role: prompt=ask,chosen=good (roles: {', '.join(ROLES)})"
    )
    parser.add_argument(
        "--rank_pairs", default="best_worst", help=f"how rated answers are paired: {', '.join(RANK_PAIRS)} or random:N (best_worst)"
    )
    parser.add_argument("--min_gap", type=float, default=0, help="minimum difference of a pair's scores, if it has any (0)")
    parser.add_argument(
        "--tree_tokens", type=int, default=0, help="maximum tokens of a tree, the pairs of one prompt in one sample (0: 4 times ctx_len)"
    )
    parser.add_argument("--on_error", choices=ON_ERROR, default="stop", help="malformed rows: stop, or skip and count them (stop)")
    parser.add_argument("--load_model", required=True, help="the reference: the .pth that training will start from")
    parser.add_argument("--out_dir", type=Path, default=Path(), help="folder to write to (the current folder)")
    parser.add_argument("--overwrite", type=int, choices=(0, 1), default=0, help="1: replace pair files made with other flags (0)")
    parser.add_argument("--limit", type=int, default=0, help="read only this many rows of a source (0: all)")
    parser.add_argument("--ctx_len", type=int, default=4096, help="maximum tokens of prompt + answer; longer ones are truncated (4096)")
    parser.add_argument(
        "--templates", default="mix", help="mix: the original's three for single turns; chat: one; g1, g1-think: RWKV-7 G1's, "
        "without and with empty thinking where the data have none; or a .txt or .json file of your own (mix)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of templates and splits (0)")
    parser.add_argument("--valid_ratio", type=float, default=0.1, help="share of prompts in validset.save (0.1)")
    parser.add_argument("--test_ratio", type=float, default=0.1, help="share of prompts in testset.save (0.1)")
    parser.add_argument(
        "--original_format", type=int, choices=(0, 1), default=0, help="1: the original's format, a list for torch.load, no header (0)"
    )
    parser.add_argument("--precision", choices=("fp32", "tf32", "fp16", "bf16"), default="fp32", help="precision of the reference (fp32)")
    add_quant_flag(parser)
    parser.add_argument("--batch_tokens", type=int, default=8192, help="number of tokens scored at once (8192)")
    parser.add_argument("--wkv_backend", default="auto", help="auto, reference, chunked, cpu or cuda (auto)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one (auto)")
    return parser


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked command line. Raises InputError."""
    args = build_parser().parse_args(arguments)
    check_flags(args)
    return args


def check_flags(args: argparse.Namespace) -> None:
    """Refuse combinations that make no sense, and what would fail only after hours. --load_model becomes a path."""
    for name, least in (("limit", 0), ("ctx_len", 2), ("tree_tokens", 0), ("batch_tokens", 1)):
        if getattr(args, name) < least:
            refuse(f"--{name} {getattr(args, name)}: at least {least} is accepted")
    if not (args.valid_ratio >= 0 and args.test_ratio >= 0 and args.valid_ratio + args.test_ratio < 1):
        refuse(f"--valid_ratio {args.valid_ratio} --test_ratio {args.test_ratio}: neither may be below 0, and their sum has to be below 1")
    args.load_model = local_file("--load_model", args.load_model)
    if not os.path.isfile(args.load_model):
        refuse(f"--load_model {args.load_model}: no such file")
    parse_sources(args.source)
    check_encoding(args.encoding)
    load_templates(args.templates)
    parse_columns(args.columns)
    Pairing(args.rank_pairs, args.min_gap)
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out_dir {args.out_dir}: cannot be created: {error.strerror}") from error
    # Checked now, not after hours of scoring.
    if not os.access(args.out_dir, os.W_OK):
        refuse(f"--out_dir {args.out_dir}: cannot be written to")


def warn(line: str) -> None:
    """Print a warning on standard error."""
    print(f"warning: {line}", file=sys.stderr)


def tell_dropped(report: Report) -> None:
    """Print the rows that were dropped, each with its place and the reason."""
    n_dropped = report.counts()["dropped"]
    for reason, places in report.dropped_rows().items():
        for where in places:
            print(f"{where}: dropped: {reason}")
        if n_more := n_dropped[reason] - len(places):
            print(f"... and {n_more} more: {reason}")
