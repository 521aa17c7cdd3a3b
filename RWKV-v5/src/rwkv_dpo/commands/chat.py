"""Chat with a checkpoint, or let it answer prompts.

    %(prog)s --load_model out/rwkv-final.pth
    %(prog)s --load_model base.pth --peft_load lora/adapter-final --prompt "Why is the sky blue?"
    %(prog)s --load_model out/rwkv-final.pth --prompts questions.txt --out answers.jsonl --n 4

Within a chat: /reset starts over, /system TEXT starts over with a system message, /undo removes the last turn, /retry asks for another
answer, /save FILE.jsonl writes the dialogue, /quit ends the chat.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.base.parser import OneLineParser
from rwkv_dpo.base.script import run_script
from rwkv_dpo.data.prompt_files import read_prompts
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.evaluation.flags import add_device_flags, add_quant_flag, add_sampling_flags, check_sampling, sampling_of
from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.files.hub import local_file
from rwkv_dpo.files.json_text import as_json

_COMMANDS = "/reset, /system TEXT, /undo, /retry, /save FILE.jsonl and /quit"


def run(arguments: Sequence[str]) -> NoReturn:
    """Runs the command, and ends the process with its status."""
    run_script(lambda: main(arguments))


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises InputError."""
    args = parse_flags(arguments)
    prompts = [args.prompt] if args.prompt else []
    if args.prompts:
        prompts = [row.prompt for row in read_prompts("--prompts", args.prompts)]
    checkpoint = local_file("--load_model", args.load_model)
    # Here, not above: --help and a mistyped flag need no PyTorch.
    from rwkv_dpo.devices.device import pick_device, set_up
    from rwkv_dpo.evaluation.answering import load_speaker
    from rwkv_dpo.evaluation.dialogue import Dialogue

    device = pick_device(args.device, "--device")
    set_up(device, args.precision)
    model = load_speaker(checkpoint, args.peft_load, args.any_base == 1, device, args.precision, args.wkv_backend, args.quant)
    if prompts:
        answer_all(args, model, prompts)
    else:
        chat(Dialogue(model, WorldTokenizer(), sampling_of(args), args.max_tokens, args.seed, args.system))


def answer_all(args: argparse.Namespace, model: Any, prompts: list[str]) -> None:
    """Prints the answers to prompts, or writes them to --out."""
    from rwkv_dpo.evaluation.answering import answer_prompts

    batches = answer_prompts(model, prompts, args.n, sampling_of(args), args.max_tokens, args.seed, args.system)
    found = [of_prompt for batch in batches for of_prompt in batch]
    rows = [{"prompt": prompt, "answers": of_prompt} for prompt, of_prompt in zip(prompts, found, strict=True)]
    if args.out:
        with atomic_write(args.out) as file:
            file.writelines(as_json(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        return
    for row in rows:
        print(*([f"User: {row['prompt']}"] if len(rows) > 1 else []), *row["answers"], sep="\n\n")


def chat(dialogue: Any) -> None:
    """Chat until the input ends, or until /quit."""
    for line in lines():
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        try:
            # An answer may be refused when its first piece is asked for.
            for piece in obey(dialogue, command, rest.strip()) if command.startswith("/") else dialogue.say(line):
                print(piece, end="", flush=True)
        except InputError as error:
            print(error, file=sys.stderr)
            continue
        print()


def obey(dialogue: Any, command: str, rest: str) -> Iterator[str]:
    """The output of a command, piece by piece. InputError for an unknown one."""
    if command == "/reset":
        dialogue.reset()
    elif command == "/system":
        dialogue.reset(rest)
    elif command == "/undo":
        return iter(["" if dialogue.undo() else "nothing to undo"])
    elif command == "/retry":
        return dialogue.retry()
    elif command == "/save":
        if not rest:
            refuse("/save FILE.jsonl: name a file")
        with atomic_write(rest) as file:
            file.write(as_json({"messages": dialogue.messages}, ensure_ascii=False).encode() + b"\n")
        return iter([f"saved {rest}"])
    else:
        refuse(f"{command}: commands are {_COMMANDS}")
    return iter([])


def lines() -> Iterator[str]:
    """The typed lines, except blank ones, with history and editing in a terminal."""
    if sys.stdin.isatty():
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory

        session: Any = PromptSession(history=InMemoryHistory())
        while True:
            try:
                line = session.prompt("User: ")
            except EOFError:
                return
            if line.strip():
                yield line
    yield from (line for line in map(str.rstrip, sys.stdin) if line.strip())


def build_parser() -> OneLineParser:
    """The flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load_model", required=True, help="the checkpoint")
    parser.add_argument("--peft_load", default="", help="an adapter folder or a state file for it")
    parser.add_argument("--any_base", type=int, choices=(0, 1), default=0, help="1: accept an adapter of another base model (0)")
    parser.add_argument("--system", default="", help="system message at the start")
    parser.add_argument("--prompt", default="", help="answer this prompt and exit")
    parser.add_argument("--prompts", type=Path, help="answer every line of this file, or the field prompt of every line of a .jsonl file")
    parser.add_argument("--n", type=int, default=1, help="number of answers to each prompt (1)")
    parser.add_argument("--out", type=Path, help="write prompts and answers to this file, one JSON object per line")
    add_sampling_flags(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (0)")
    add_quant_flag(parser)
    add_device_flags(parser)
    return parser


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The checked command line. Raises InputError."""
    args = build_parser().parse_args(arguments)
    if args.n < 1:
        refuse(f"--n {args.n}: at least 1 is accepted")
    check_sampling(args)
    if args.prompt and args.prompts:
        refuse("--prompt and --prompts: only one of them is accepted")
    if (args.out or args.n > 1) and not (args.prompt or args.prompts):
        refuse(f"{'--out' if args.out else '--n'} needs --prompt or --prompts; within a chat, /save FILE.jsonl writes the dialogue")
    return args
