#!/usr/bin/env python3
"""Compare checkpoints: preference accuracy and margin on pairs, perplexity on a corpus, and an answer to a prompt.

evaluate.py --load_model base.pth tuned.pth --pairs testset.save --data_file default_text_document
evaluate.py --load_model base.pth --peft_load out/adapter-final --pairs testset.save
"""

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.base.parser import OneLineParser
from rwkv_dpo.base.script import leave_without, run_script
from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.objective.settings import ObjectiveSettings

try:
    from rwkv_dpo.data.corpus import open_corpus
    from rwkv_dpo.data.corpus_names import name_corpus
    from rwkv_dpo.data.pair_files import open_pairs
    from rwkv_dpo.data.pairs import PairSet, check_pairs
    from rwkv_dpo.data.tokenizer import LAST_TOKEN, VOCAB_SIZE, WorldTokenizer
except ModuleNotFoundError as error:
    leave_without(error)


def main(arguments: list[str] | None = None) -> None:
    """Runs the script. Raises InputError."""
    args = parse_flags(arguments)
    # Here, not above: --help and a mistyped flag need no PyTorch.
    from rwkv_dpo.devices.device import COMPUTE_DTYPES, pick_device, set_up
    from rwkv_dpo.evaluation.generate import generate
    from rwkv_dpo.evaluation.origin import objectives, run_of
    from rwkv_dpo.evaluation.scoring import corpus_loss, evaluate_pairs
    from rwkv_dpo.model.checkpoint import load_model
    from rwkv_dpo.tuning.tuning import load_tuned
    from tqdm import tqdm

    device = pick_device(args.device, "--device")
    set_up(device, args.precision)
    if args.prompt:
        for path in args.load_model:
            check_reads_prompts(path)
    columns = [(path, "") for path in args.load_model] + [(args.load_model[0], tuned) for tuned in args.peft_load]
    origins = [run_of(tuned or path) for path, tuned in columns]
    pairs = open_pairs("pairs", args.pairs) if args.pairs else None
    if pairs is not None:
        tell_doubts(pairs, args.pairs, [(tuned or path, run) for (path, tuned), run in zip(columns, origins, strict=True)])
    reports = []
    for (path, tuned), own in zip(columns, objectives(origins), strict=True):
        mixture = replace(own, options=replace(own.options, beta=args.dpo_beta or own.options.beta))
        model = load_model(path, device=device, compute_dtype=COMPUTE_DTYPES[args.precision], wkv_backend=args.wkv_backend)
        if tuned:
            load_tuned(model, tuned, path, args.any_base == 1)
        report: dict = {"checkpoint": tuned or path}
        if pairs is not None:
            check_pairs(pairs, args.pairs, model.shape.vocab_size)
            with tqdm(total=len(pairs), unit="pair", desc=tuned or path, leave=False, disable=None) as bar:
                report |= evaluate_pairs(model, pairs, mixture, args.batch_tokens, bar.update)
            report |= {"dpo_beta": mixture.options.beta} if pairs.is_scored else {}
        if args.data_file:
            data_file, data_type = name_corpus(args.data_file, args.data_type)
            corpus = open_corpus(data_file, data_type, model.shape.vocab_size, args.ctx_len, path)
            starts = range(0, corpus.n_tokens - args.ctx_len, args.ctx_len)
            with tqdm(starts, unit="window", desc=tuned or path, leave=False, disable=None) as bar:
                windows = (corpus.window(start, args.ctx_len + 1) for start in bar)
                report["corpus_loss"] = corpus_loss(model, windows, args.batch_tokens)
        if args.prompt:
            prompt = f"User: {args.prompt}\n\nAssistant:"
            report["answer"] = generate(model, WorldTokenizer(), prompt, args.max_tokens, args.temperature, args.top_p, args.seed)
        reports.append(report)
    print_table(reports)
    if args.out:
        with atomic_write(args.out) as file:
            file.write(as_json(reports, indent=1, ensure_ascii=False).encode() + b"\n")


def parse_flags(arguments: list[str] | None) -> argparse.Namespace:
    """The checked command line. Raises InputError."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_model", nargs="+", required=True, help="checkpoints, a column each")
    parser.add_argument("--peft_load", nargs="+", default=[], help="adapter folders or state files on the first checkpoint, a column each")
    parser.add_argument("--any_base", type=int, choices=(0, 1), default=0, help="1: take an adapter of another base model (0)")
    parser.add_argument("--pairs", help="preference pairs (.save), scored by the first checkpoint or any other reference")
    beta = ObjectiveSettings.dpo_beta
    parser.add_argument("--dpo_beta", type=float, help=f"of the rewards (that of the checkpoint's own run; else {beta})")
    parser.add_argument("--data_file", help="corpus, as train.py takes it")
    parser.add_argument("--data_type", default="", help="as train.py takes it (what data_file is)")
    parser.add_argument("--ctx_len", type=int, default=1024, help="window of the corpus perplexity (1024)")
    parser.add_argument("--prompt", help="a question to answer")
    parser.add_argument("--max_tokens", type=int, default=100, help="of the answer (100)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0: always the likeliest token (0.7)")
    parser.add_argument("--top_p", type=float, default=0.9, help="nucleus of sampling (0.9)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    parser.add_argument("--precision", choices=("fp32", "tf32", "fp16", "bf16"), default="fp32", help="(fp32)")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="tokens scored at once (8192)")
    parser.add_argument("--wkv_backend", default="auto", help="auto, reference, chunked, cpu or cuda (auto)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when there is one (auto)")
    parser.add_argument("--out", type=Path, help="also write the report as JSON")
    args = parser.parse_args(arguments)
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
    return args


ROWS = {
    "preference accuracy": ("logps/accuracies", "{:.3f}"),
    "mean margin (nats)": ("logps/margins", "{:+.2f}"),
    "reward accuracy": ("rewards/accuracies", "{:.3f}"),
    "reward margin": ("rewards/margins", "{:+.3f}"),
    "beta of the rewards": ("dpo_beta", "{:g}"),
    "corpus loss (nats/token)": ("corpus_loss", "{:.4f}"),
    "corpus perplexity": ("corpus_perplexity", "{:.2f}"),
}


def check_reads_prompts(checkpoint: str) -> None:
    """Refuses a checkpoint whose vocabulary is smaller than the tokenizer's."""
    from rwkv_dpo.model.checkpoint import read_checkpoint, shape_of

    vocab_size = shape_of(read_checkpoint(checkpoint), checkpoint).vocab_size
    if vocab_size <= LAST_TOKEN:
        refuse(f"--prompt: becomes tokens of the World tokenizer, {VOCAB_SIZE} of them, and {checkpoint} has a vocabulary of {vocab_size}")


def tell_doubts(pairs: PairSet, name: str, columns: list[tuple[str, Mapping[str, Any]]]) -> None:
    """Warns of pairs that are not held out from a column's run, or not scored. InputError for those of another preparation."""
    from rwkv_dpo.evaluation.origin import check_not_trained_on

    doubts = [check_not_trained_on(pairs, f"--pairs {name}", run, checkpoint) for checkpoint, run in columns]
    if not pairs.is_scored:
        doubts.append(f"--pairs {name}: not scored by a reference, so that rewards are left out; prepare_pairs.py scores pairs")
    for doubt in filter(None, doubts):
        print(f"warning: {doubt}", file=sys.stderr)


def print_table(reports: list[dict]) -> None:
    """A column a checkpoint, with each answer below."""
    for report in reports:
        if "logps/chosen" in report:
            report["logps/margins"] = report["logps/chosen"] - report["logps/rejected"]
        if "corpus_loss" in report:
            report["corpus_perplexity"] = math.exp(report["corpus_loss"])
    names = ["/".join(Path(report["checkpoint"]).parts[-2:]) for report in reports]
    width = max(12, *(len(name) + 2 for name in names))
    print(f"{'':26}" + "".join(f"{name:>{width}}" for name in names))
    for label, (name, form) in ROWS.items():
        if name in reports[0]:
            print(f"{label:26}" + "".join(f"{form.format(report[name]):>{width}}" for report in reports))
    if "corpus_loss" in reports[0] and len(reports) > 1:
        changes = (f"{100 * (report['corpus_loss'] / reports[0]['corpus_loss'] - 1):+.1f} %" for report in reports)
        print(f"{'change of corpus loss':26}" + "".join(f"{change:>{width}}" for change in changes))
    for name, report in zip(names, reports, strict=True):
        if "answer" in report:
            print(f"\n{name} answers:\n  {report['answer']}")


if __name__ == "__main__":
    run_script(main)
