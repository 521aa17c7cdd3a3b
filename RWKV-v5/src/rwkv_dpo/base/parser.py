"""The command line of every script: argparse, with its errors in one line."""

import argparse
import difflib
import sys
from typing import Any, NoReturn

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.base.script import program

# Share of letters in common above which a name counts as a typo: n_layers, dpo_betta, but not lora for lora_r.
_NEAR = 0.85


class OneLineParser(argparse.ArgumentParser):
    """Reports errors as InputError, so that every script prints them the same way; accepts no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **{"prog": program(), **settings})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's. Raises InputError."""
        # To argparse "--name=--" is a flag with a list of no values, not a missing value.
        for argument in sys.argv[1:] if args is None else args:
            if argument.startswith("--") and argument.endswith("=--"):
                self.error(f"{argument.removesuffix('=--')}: expected one argument, found '--'")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's. Raises InputError."""
        given, unknown = self.parse_known_args(args, namespace)
        return self.refuse_unknown(unknown[0]) if unknown else given

    def refuse_unknown(self, argument: str) -> NoReturn:
        """Refuse an unknown flag, naming the flag that may have been meant if it is one or two letters away."""
        if not argument.startswith("-"):
            refuse(f"{argument!r}: not expected; flags look like --name value")
        name = argument.split("=")[0]
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(name.lstrip("-"), known, n=1, cutoff=_NEAR)
        refuse(f"{name}: unknown flag{f'; did you mean --{near[0]}?' if near else ''} (--help lists them all)")

    def error(self, message: str):
        """Raises InputError."""
        refuse(message)


class HelpFormatter(argparse.HelpFormatter):
    """With columns wide enough for today's terminals."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=120)
