"""Compare checkpoints: preferences and calibration on pairs, loss and divergence on corpora, and answers to prompts.

%(prog)s --load_model base.pth tuned.pth --pairs testset.save --data_file default_text_document
%(prog)s --load_model base.pth --peft_load out/adapter-final --pairs testset.save other.save --plot report.png
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.base.parser import OneLineParser
from rwkv_dpo.base.script import run_script
from rwkv_dpo.data.corpus import Corpus
from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.data.prompt_files import as_question
from rwkv_dpo.data.tokenizer import WorldTokenizer, check_reads_text
from rwkv_dpo.evaluation.flags import add_device_flags, add_quant_flag
from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.files.hub import local_file
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.objective.settings import ObjectiveSettings


def run(arguments: Sequence[str]) -> NoReturn:
    """Runs the command, and ends the process with its status."""
    run_script(lambda: main(arguments))


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises InputError."""
    args = parse_flags(arguments)
    checkpoints = [local_file("--load_model", name) for name in args.load_model]
    # Here, not above: --help and a mistyped flag need no PyTorch.
    from rwkv_dpo.devices.device import COMPUTE_DTYPES, pick_device, set_up
    from rwkv_dpo.evaluation.compare import compare
    from rwkv_dpo.evaluation.inputs import open_corpora, open_pair_files, vocab_sizes
    from rwkv_dpo.evaluation.origin import doubts_of, objectives, run_of
    from rwkv_dpo.model.checkpoint import load_model
    from rwkv_dpo.report.evaluation_table import as_table
    from rwkv_dpo.tuning.tuning import load_tuned

    if args.plot:
        from rwkv_dpo.report.evaluation_plot import write_plot
    device = pick_device(args.device, "--device")
    set_up(device, args.precision)
    columns = [(path, "") for path in checkpoints] + [(checkpoints[0], tuned) for tuned in args.peft_load]
    names = [*args.load_model, *args.peft_load]
    with_kl = args.kl == 1 and len(columns) > 1
    sizes = vocab_sizes(checkpoints)
    for path, size in sizes.items() if args.prompt else ():
        check_reads_text(size, "--prompt", path)
    pairs = open_pair_files(args.pairs, sizes)
    corpora = open_corpora(args.data_file, args.data_type, args.ctx_len, sizes, with_kl)
    runs = [run_of(tuned or path) for path, tuned in columns]
    for doubt in doubts_of({f"--pairs {name}": of_file for name, of_file in pairs.items()}, names, runs):
        print(f"warning: {doubt}", file=sys.stderr)
    mixtures = [replace(own, options=replace(own.options, beta=args.dpo_beta or own.options.beta)) for own in objectives(runs)]
    found, first = [], None
    for name, (path, tuned) in zip(names, columns, strict=True):
        held = "none" if tuned else args.quant  # PiSSA takes its start out of matrices as they are
        dtype = COMPUTE_DTYPES[args.precision]
        model = load_model(path, device=device, compute_dtype=dtype, wkv_backend=args.wkv_backend, quant=held)
        if tuned:
            load_tuned(model, tuned, path, args.any_base == 1, args.quant)
        found.append(scores_of(model, name, pairs, corpora[path], first, args))
        # The divergence of the others is measured from this one.
        first = first or (model if with_kl and args.data_file else None)
        del model
    reports = compare(names, pairs, found, mixtures, with_kl, args.seed)
    print(as_table(reports))
    if args.out:
        with atomic_write(args.out) as file:
            file.write(as_json(reports, indent=1, ensure_ascii=False).encode() + b"\n")
    if args.plot:
        with atomic_write(args.plot) as file:
            write_plot(reports, file)


def scores_of(
    model: Any, name: str, pairs: Mapping[str, PairSet], corpora: Mapping[str, Corpus], first: Any, args: argparse.Namespace
) -> Any:
    """compare.Scores of a model on all that is to be read. first: the first column's model, where the divergence from it is wanted."""
    from tqdm import tqdm

    from rwkv_dpo.evaluation.compare import Scores
    from rwkv_dpo.evaluation.divergence import score_windows
    from rwkv_dpo.evaluation.generate import Sampling, answers
    from rwkv_dpo.evaluation.scoring import score_pairs

    found = Scores({}, {}, {})
    for file, of_file in pairs.items():
        with tqdm(total=len(of_file), unit="pair", desc=name, leave=False, disable=None) as bar:
            found.pairs[file] = score_pairs(model, of_file, args.batch_tokens, bar.update)
    for file, corpus in corpora.items():
        starts = range(0, corpus.n_tokens - args.ctx_len, args.ctx_len)
        with tqdm(starts, unit="window", desc=name, leave=False, disable=None) as bar:
            windows = (corpus.window(start, args.ctx_len + 1) for start in bar)
            found.corpora[file] = score_windows(model, windows, args.batch_tokens, first)
    written = [as_question(prompt) for prompt in args.prompt]
    sampling = Sampling(args.temperature, args.top_p)
    of_prompts = answers(model, WorldTokenizer(), written, 1, sampling, args.max_tokens, args.seed) if written else []
    found.answers.update(zip(args.prompt, (text for (text,) in of_prompts), strict=True))
    return found


def build_parser() -> OneLineParser:
    """The flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_model", nargs="+", required=True, help="checkpoints, one column each")
    parser.add_argument("--peft_load", nargs="+", default=[], help="adapters or state files for the first checkpoint, one column each")
    parser.add_argument("--any_base", type=int, choices=(0, 1), default=0, help="1: accept an adapter of another base model (0)")
    parser.add_argument("--pairs", nargs="+", default=[], help="preference pairs (.save), scored by the first checkpoint or another")
    beta = ObjectiveSettings.dpo_beta
    parser.add_argument("--dpo_beta", type=float, help=f"beta of the rewards (that of the checkpoint's own run, or {beta})")
    parser.add_argument("--data_file", nargs="+", default=[], help="corpora, in the formats of train.py")
    parser.add_argument("--data_type", nargs="+", default=[], help="format of the corpora, one for all or one each (detected)")
    parser.add_argument("--ctx_len", type=int, default=1024, help="window of the corpus perplexity (1024)")
    parser.add_argument(
        "--kl", type=int, choices=(0, 1), default=1, help="0: skip the KL divergence, for which the first model stays in memory (1)"
    )
    parser.add_argument("--prompt", nargs="+", default=[], help="questions to answer")
    parser.add_argument("--max_tokens", type=int, default=100, help="maximum tokens of an answer (100)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the most likely token (0.7)")
    parser.add_argument("--top_p", type=float, default=0.9, help="nucleus sampling (0.9)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling and of the bootstrap (0)")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="number of tokens scored at once (8192)")
    add_quant_flag(parser)
    add_device_flags(parser)
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--plot", type=Path, help="draw accuracy, calibration and margins of --pairs into this .png file")
    return parser


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked command line. Raises InputError."""
    args = build_parser().parse_args(arguments)
    for name, least in (("ctx_len", 1), ("max_tokens", 0), ("batch_tokens", 1)):
        if getattr(args, name) < least:
            refuse(f"--{name} {getattr(args, name)}: at least {least} is accepted")
    for name, is_good, accepted in (
        ("dpo_beta", args.dpo_beta is None or 0 < args.dpo_beta < math.inf, "more than 0"),
        ("temperature", 0 <= args.temperature < math.inf, "0 or more"),
        ("top_p", 0 <= args.top_p <= 1, "0 to 1"),
        ("seed", -(2**63) <= args.seed < 2**63, "a number of 64 bits"),
    ):
        if not is_good:
            refuse(f"--{name} {str(getattr(args, name))[:30]}: {accepted} is accepted")
    if args.plot and (args.plot.suffix != ".png" or not args.pairs):
        refuse(f"--plot {args.plot}: a .png file is written" if args.pairs else "--plot draws results on pairs, which --pairs names")
    if not all(prompt.strip() for prompt in args.prompt) or len(set(args.prompt)) < len(args.prompt):
        refuse("--prompt: takes texts, each of them once")
    for name in ("out", "plot"):
        path = getattr(args, name)
        # Not by Path, whose is_dir raises for a name that is too long.
        if path and (os.path.isdir(path) or not os.path.isdir(path.parent)):
            refuse(f"--{name} {path}: {'a folder; a file is written' if os.path.isdir(path) else 'its folder does not exist'}")
    return args
