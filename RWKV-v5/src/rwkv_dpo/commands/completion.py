"""Completion of `rwkv-dpo ...` at a shell, by argcomplete: commands, flags, the values that a flag takes, files.

A shell that was told of it (`eval "$(register-python-argcomplete rwkv-dpo)"`) starts the command itself, with the line so far in its
environment, at every Tab.
"""

import importlib
import os

from rwkv_dpo.base.parser import OneLineParser
from rwkv_dpo.commands.door import COMMANDS, build_parser


def answer() -> None:
    """Tell the shell how its line may continue, and end the process."""
    import argcomplete

    typed = os.environ["COMP_LINE"].split()[1:]
    command = next((word for word in typed if word in COMMANDS), "")
    flags = {command: flags_of(command)} if command else {}
    argcomplete.autocomplete(build_parser(flags))


def flags_of(command: str) -> OneLineParser:
    """The parser of a command."""
    parser: OneLineParser = importlib.import_module(f"rwkv_dpo.commands.{COMMANDS[command].module}").build_parser()
    if command == "train":
        from rwkv_dpo.run.settings import FLAGS

        # The settings check their own values, so the parser has none.
        for action in parser._actions:
            if action.dest in FLAGS and (choices := [choice for choice in FLAGS[action.dest].choices if choice]):
                action.choices = choices
    return parser
