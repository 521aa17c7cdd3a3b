"""The entry point of every command: `rwkv-dpo COMMAND`, and the scripts in RWKV-v5/."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from rwkv_dpo import __version__
from rwkv_dpo.base.parser import HelpFormatter, OneLineParser
from rwkv_dpo.base.script import CONSOLE, leave_without, run_script


class Command(NamedTuple):
    """module: in this room, also the name of the script. what: what it does, in one line."""

    module: str
    what: str


COMMANDS = {
    "train": Command("train", "train a model on a corpus, on preference pairs, or on both"),
    "prepare": Command("prepare_pairs", "make pair files from a preference data set"),
    "data": Command("make_data", "make a binidx corpus from text"),
    "evaluate": Command("evaluate", "compare checkpoints"),
    "chat": Command("chat", "chat with a checkpoint, or let it answer prompts"),
    "blindtest": Command("blindtest", "compare two models blind"),
    "export": Command("export", "merge adapters, and convert checkpoints"),
    "doctor": Command("doctor", "show what a run would use on this machine, and what is wrong"),
}


def main() -> NoReturn:
    """rwkv-dpo, and python -m rwkv_dpo."""
    if "_ARGCOMPLETE" in os.environ:
        from rwkv_dpo.commands.completion import answer  # a shell asks, no user

        answer()
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        enter(COMMANDS[arguments[0]].module, arguments[1:])
    run_script(lambda: build_parser().parse_args(arguments or ["--help"]), name=CONSOLE)


def enter(module: str, arguments: Sequence[str]) -> NoReturn:
    """Run a command, and end the process with its status; with one line if a package that it always needs is missing."""
    try:
        command = importlib.import_module(f"rwkv_dpo.commands.{module}")
    except ModuleNotFoundError as error:
        leave_without(error)
    command.run(arguments)
    raise AssertionError(f"{module}.run came back")


def build_parser(flags: Mapping[str, OneLineParser] | None = None) -> OneLineParser:
    """The parser of rwkv-dpo itself: the commands, with the flags of those that are given."""
    parser = OneLineParser(
        prog=CONSOLE, description="Preference tuning for RWKV language models. Each command is also a script, which messages may name.",
        epilog=f"{CONSOLE} COMMAND --help lists a command's flags.", formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"{CONSOLE} {__version__}")
    commands = parser.add_subparsers(dest="COMMAND", required=True, title="commands")
    for name, command in COMMANDS.items():
        known = [flags[name]] if flags and name in flags else []
        commands.add_parser(name, help=f"{command.what} ({command.module}.py)", add_help=False, parents=known)
    return parser
