"""Compare two models blind: their answers are shown side by side, and only the result reveals which is whose.

    %(prog)s --load_model base.pth out/rwkv-final.pth --folder judged
    %(prog)s --load_model base.pth --peft_load lora/adapter-final --auto testset.save
    %(prog)s --answers base.jsonl tuned.jsonl --terminal 1 --export pairs.jsonl

On the page: left or a (A is better), right or b (B is better), space or = (equal), u (undo), p (pause). Answers and votes are kept in
--folder, and the same command continues where it was. The result says which model is which and ends the test.
"""

import argparse
import hashlib
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.base.libraries import check_package
from rwkv_dpo.base.parser import OneLineParser
from rwkv_dpo.base.script import run_script
from rwkv_dpo.blind.ballot import Ballot
from rwkv_dpo.blind.cards import Card, Question, deal, read_answers, read_cards, read_questions, write_cards
from rwkv_dpo.blind.folder import check, claim
from rwkv_dpo.blind.result import as_text, pairs_of, result_of, shown
from rwkv_dpo.blind.terminal import judge, typed_lines
from rwkv_dpo.blind.votes import open_votes
from rwkv_dpo.data.pair_files import open_pairs
from rwkv_dpo.data.pairs import PairSet, check_pairs
from rwkv_dpo.evaluation.flags import add_device_flags, add_sampling_flags, check_sampling, sampling_of
from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.files.hashed import file_sha256, path_sha256
from rwkv_dpo.files.hub import local_file
from rwkv_dpo.files.json_text import as_json

RESULT = "result.json"
PORT = 8477
# Flags that have no meaning for existing answers.
OF_MODELS = (
    "peft_load", "any_base", "questions", "auto", "system", "max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "repetition_penalty", "penalty_decay", "precision", "wkv_backend", "device",
)  # fmt: skip
# Those of them that the answers depend on, apart from models and questions.
OF_ANSWERS = OF_MODELS[4:-2]


class Column(NamedTuple):
    """One of the two models: a checkpoint, and its adapter or state, if any."""

    checkpoint: str
    tuned: str = ""


def run(arguments: Sequence[str]) -> NoReturn:
    """Runs the command, and ends the process with its status."""
    run_script(lambda: main(arguments), stopped="answers and votes so far are kept; the same command continues where it was")


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises InputError."""
    args = parse_flags(arguments)
    listener = None if args.terminal else listen_on(args.port)
    names, cards, held_out = from_answers(args) if args.answers else from_models(args)
    with open_votes(args.folder, len(cards)) as votes:
        def result() -> dict[str, Any]:
            return result_of(names, cards, votes.choices, held_out)

        ballot = Ballot(cards, votes, lambda: shown(result()))
        if listener is None:
            judge(ballot, typed_lines(), partial(print, flush=True))
        elif not votes.is_ended:
            from rwkv_dpo.blind import browser

            browser.judge(ballot, listener, args.open_browser == 1)
        if not votes.is_ended:
            print(f"{len(votes.choices)} votes are kept; the same command continues where it was")
            return
        write_end(args, cards, votes.choices, result())


def listen_on(port: int) -> socket.socket:
    """The port of the page, opened now: a port in use should be noticed before hours of generating answers."""
    check_package("aiohttp", "--terminal 0", "--terminal 1 needs nothing")
    from rwkv_dpo.blind.server import listen

    return listen(port)


def from_models(args: argparse.Namespace) -> tuple[list[str], list[Card], Sequence[dict[str, float]]]:
    """Names of the models, the cards, and what --auto says."""
    paths = [local_file("--load_model", name) for name in args.load_model]
    columns = [Column(path) for path in paths] if not args.peft_load else [Column(paths[0]), Column(paths[0], args.peft_load)]
    contents = [f"{path_sha256(column.checkpoint)} {path_sha256(column.tuned) if column.tuned else ''}".strip() for column in columns]
    if contents[0] == contents[1] and all(contents):
        refuse(f"--load_model {' '.join(args.load_model)}: the same model twice")
    questions = read_questions(args.questions)
    flags = {name: getattr(args, name) for name in (*OF_ANSWERS, "seed")}
    test = {"models": contents, "questions": sha256_of([question.prompt for question in questions]), **flags}
    check(args.folder, test)
    cards, names = read_cards(args.folder), labels([*args.load_model, args.peft_load][:2])
    held_out: Sequence[dict[str, float]] = ()
    if not cards or args.auto:
        # Everything that can be refused is refused before anything is written, and before hours of generating answers.
        pairs = open_pairs("auto", args.auto) if args.auto else None
        losses = losses_on(args, columns, pairs) if pairs is not None else ()
        loads = loaders(args, columns, pairs)
        claim(args.folder, names, test)
        cards = cards or answered(args, loads, questions)
        held_out = scored(args, loads, losses, pairs) if pairs is not None else ()
    return names, cards, held_out


def from_answers(args: argparse.Namespace) -> tuple[list[str], list[Card], Sequence[dict[str, float]]]:
    """As from_models, of --answers."""
    questions, answers = read_answers(args.answers)
    names = labels(args.answers)
    contents = [file_sha256(path) for path in args.answers]
    claim(args.folder, names, {"models": contents, "seed": args.seed})
    if not (cards := read_cards(args.folder)):
        cards = deal(questions, answers, args.seed)
        write_cards(args.folder, cards)
    return names, cards, ()


def loaders(args: argparse.Namespace, columns: Sequence[Column], pairs: PairSet | None) -> list[Callable[[], Any]]:
    """A loader of each model, after checking that the models can read questions and pairs."""
    from rwkv_dpo.blind.models import vocabulary_of
    from rwkv_dpo.devices.device import pick_device, set_up
    from rwkv_dpo.evaluation.answering import load_speaker

    device = pick_device(args.device, "--device")
    set_up(device, args.precision)
    vocab_size = vocabulary_of([column.checkpoint for column in columns])
    if pairs is not None:
        check_pairs(pairs, f"--auto {args.auto}", vocab_size)
    return [partial(load_speaker, *column, args.any_base == 1, device, args.precision, args.wkv_backend) for column in columns]


def answered(args: argparse.Namespace, loads: Sequence[Callable[[], Any]], questions: Sequence[Question]) -> list[Card]:
    """Let the models answer, and keep the answers."""
    from tqdm import tqdm

    from rwkv_dpo.blind.models import answer_all, discard_journal

    prompts = [question.prompt for question in questions]
    with tqdm(total=2 * len(prompts), unit="answer", desc="answers", leave=False, disable=None) as bar:
        answers = answer_all(args.folder, loads, prompts, sampling_of(args), args.max_tokens, args.seed, args.system, bar.update)
    cards = deal(questions, answers, args.seed)
    write_cards(args.folder, cards)
    discard_journal(args.folder)
    return cards


def losses_on(args: argparse.Namespace, columns: Sequence[Column], pairs: PairSet) -> Sequence[Any]:
    """The preference losses that define each model's margins, from its run; warns of pairs that a model was trained on."""
    from rwkv_dpo.evaluation.origin import doubts_of, objectives, run_of

    paths = [column.tuned or column.checkpoint for column in columns]
    runs = [run_of(path) for path in paths]
    for doubt in doubts_of({f"--auto {args.auto}": pairs}, paths, runs):
        print(f"warning: {doubt}", file=sys.stderr)
    return objectives(runs)


def scored(args: argparse.Namespace, loads: Sequence[Callable[[], Any]], losses: Sequence[Any], pairs: PairSet) -> list[dict[str, float]]:
    """The scores of both models on the held-out pairs."""
    from tqdm import tqdm

    from rwkv_dpo.blind.models import score_all

    with tqdm(total=2 * len(pairs), unit="pair", desc="pairs", leave=False, disable=None) as bar:
        return score_all(args.folder, loads, pairs, losses, args.batch_tokens, bar.update)


def write_end(args: argparse.Namespace, cards: Sequence[Card], choices: dict[int, str], result: dict[str, Any]) -> None:
    """The result, in the folder and printed, and the pairs of --export."""
    with atomic_write(args.folder / RESULT) as file:
        file.write(as_json(result, indent=1, ensure_ascii=False).encode() + b"\n")
    print(as_text(result))
    if args.export:
        rows = list(pairs_of(cards, choices, args.system))
        with atomic_write(args.export) as file:
            file.writelines(as_json(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        print(f"{args.export}: {len(rows)} pairs")


def labels(paths: Sequence[str | Path]) -> list[str]:
    """The last two parts of each path, or the whole path if these are the same."""
    short = ["/".join(Path(path).parts[-2:]) for path in paths]
    return short if short[0] != short[1] else list(map(str, paths))


def sha256_of(value: Any) -> str:
    """The sha256 of a JSON value."""
    return hashlib.sha256(as_json(value).encode()).hexdigest()


def build_parser() -> OneLineParser:
    """The flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_model", nargs="+", default=[], help="two checkpoints, or one with --peft_load")
    parser.add_argument("--peft_load", default="", help="an adapter folder or a state file, compared with the checkpoint without it")
    parser.add_argument("--any_base", type=int, choices=(0, 1), default=0, help="1: accept an adapter of another base model (0)")
    parser.add_argument("--answers", type=Path, nargs=2, metavar="FILE", help="two files of chat.py --prompts --out, instead of models")
    parser.add_argument("--folder", type=Path, default=Path("blindtest"), help="folder for answers, votes and the result (blindtest)")
    parser.add_argument("--questions", type=Path, help="one per line, or the field prompt of every line of a .jsonl file (72 of our own)")
    parser.add_argument("--system", default="", help="system message before every question")
    parser.add_argument("--terminal", type=int, choices=(0, 1), default=0, help="1: ask in the terminal or a pipe; 0: on a page (0)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port of the page on this machine; 0: any free one ({PORT})")
    parser.add_argument("--open_browser", type=int, choices=(0, 1), default=1, help="0: only print the address (1)")
    parser.add_argument("--export", type=Path, help="at the end, write the votes as preference pairs, for prepare_pairs.py --source")
    parser.add_argument("--auto", help="held-out pairs (.save); the result adds both models' accuracy and margin on them")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="number of tokens of --auto scored at once (8192)")
    add_sampling_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling, sides and order (0)")
    add_device_flags(parser)
    return parser


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked command line. Raises InputError."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    check_sampling(args)
    check_sources(args, parser)
    if not 0 <= args.port <= 65535:
        refuse(f"--port {args.port}: 0 to 65535 is accepted")
    if args.batch_tokens < 1:
        refuse(f"--batch_tokens {args.batch_tokens}: at least 1 is accepted")
    return args


def check_sources(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse anything except two models or two files of answers."""
    if args.answers:
        for name in ("load_model", *OF_MODELS):
            if getattr(args, name) != parser.get_default(name):
                refuse(f"--answers and --{name}: the answers exist already; --{name} is for models that generate them")
        for path in args.answers:
            if not path.is_file():
                refuse(f"--answers {path}: {'a folder' if path.is_dir() else 'no such file'}")
    elif not args.load_model:
        refuse("one of these is needed: --load_model A.pth B.pth, --load_model A.pth --peft_load ADAPTER, --answers A.jsonl B.jsonl")
    elif (n := len(args.load_model)) != (1 if args.peft_load else 2):
        what = "1, the base of the adapter" if args.peft_load else "2, or 1 with --peft_load"
        refuse(f"--load_model: {n} checkpoints; accepted are {what}")
