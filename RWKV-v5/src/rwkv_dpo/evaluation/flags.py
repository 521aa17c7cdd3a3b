"""The flags by which scripts that make text are told how: what is drawn, and on what it is computed. Without PyTorch, for --help."""

import argparse
import math
from typing import TYPE_CHECKING

from rwkv_dpo.base.errors import refuse

if TYPE_CHECKING:
    from rwkv_dpo.evaluation.generate import Sampling


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """How answers are drawn."""
    parser.add_argument("--max_tokens", type=int, default=300, help="of an answer (300)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the most likely token (1)")
    parser.add_argument("--top_p", type=float, default=0.7, help="sample from the most likely tokens, to this total probability (0.7)")
    parser.add_argument("--top_k", type=int, default=0, help="sample from this many most likely tokens (0: all)")
    parser.add_argument("--min_p", type=float, default=0.0, help="sample from tokens above this share of the highest probability (0)")
    parser.add_argument("--presence_penalty", type=float, default=0.0, help="off the logit of a token that the answer has (0)")
    parser.add_argument("--repetition_penalty", type=float, default=0.0, help="off it for each time that the answer has it (0)")
    parser.add_argument("--penalty_decay", type=float, default=0.996, help="of each time, with every token that follows (0.996)")


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """On what the model is computed, and in which arithmetic."""
    parser.add_argument("--precision", choices=("fp32", "tf32", "fp16", "bf16"), default="fp32", help="(fp32)")
    parser.add_argument("--wkv_backend", default="auto", help="auto, reference, chunked, cpu or cuda (auto)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU when there is one (auto)")


def add_quant_flag(parser: argparse.ArgumentParser) -> None:
    """In which form the model's matrices are held."""
    text = "hold the projections of --load_model in 8 or 4 bits, as train.py does (none)"
    parser.add_argument("--quant", choices=("none", "int8", "nf4"), default="none", help=text)


def check_sampling(args: argparse.Namespace) -> None:
    """InputError for a value that is none of sampling; --seed, which each script words itself, too."""
    for name, is_good, accepted in (
        ("max_tokens", args.max_tokens >= 0, "0 or more"), ("top_k", args.top_k >= 0, "0 or more"),
        ("temperature", 0 <= args.temperature < math.inf, "0 or more"), ("top_p", 0 <= args.top_p <= 1, "0 to 1"),
        ("min_p", 0 <= args.min_p <= 1, "0 to 1"), ("penalty_decay", 0 <= args.penalty_decay <= 1, "0 to 1"),
        ("presence_penalty", math.isfinite(args.presence_penalty), "a number"),
        ("repetition_penalty", math.isfinite(args.repetition_penalty), "a number"),
        ("seed", -(2**63) <= args.seed < 2**62, "a number of 62 bits"),
    ):  # fmt: skip
        if not is_good:
            refuse(f"--{name} {str(getattr(args, name))[:30]}: {accepted} is accepted")


def sampling_of(args: argparse.Namespace) -> "Sampling":
    """What the flags say. Imports PyTorch."""
    from rwkv_dpo.evaluation.generate import Sampling

    return Sampling(
        args.temperature, args.top_p, args.top_k, args.min_p, args.presence_penalty, args.repetition_penalty, args.penalty_decay
    )
