"""The door to every command: `rwkv-dpo COMMAND`, and the scripts in RWKV-v5/."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from rwkv_dpo import __version__
from rwkv_dpo.base.parser import HelpFormatter, OneLineParser
from rwkv_dpo.base.script import CONSOLE, leave_without, run_script


class Command(NamedTuple):
    """module: of this room, and the name of the script. what: it does, in a line."""

    module: str
    what: str


COMMANDS = {
    "train": Command("train", "train a model on a corpus, on preference pairs, or on both"),
    "prepare": Command("prepare_pairs", "make pair files of a preference data set"),
    "data": Command("make_data", "make a binidx corpus of text"),
    "evaluate": Command("evaluate", "compare checkpoints"),
    "chat": Command("chat", "talk to a checkpoint, or have it answer prompts"),
    "blindtest": Command("blindtest", "judge two models blind"),
    "export": Command("export", "merge adapters, and convert checkpoints"),
    "doctor": Command("doctor", "say what a run would take on this machine, and what is in its way"),
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
    """Runs a command, and ends the process with its status; in one line where a package that it always needs is missing."""
    try:
        command = importlib.import_module(f"rwkv_dpo.commands.{module}")
    except ModuleNotFoundError as error:
        leave_without(error)
    command.run(arguments)
    raise AssertionError(f"{module}.run came back")


def build_parser(flags: Mapping[str, OneLineParser] | None = None) -> OneLineParser:
    """Of rwkv-dpo itself: the commands, with the flags of those that are given."""
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
