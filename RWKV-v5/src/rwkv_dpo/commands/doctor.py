"""Looks at this machine, and says what a run would take: GPU, driver, compilers, whether each kernel builds and computes here what plain
PyTorch does, memory, disk; and what to do about each fault.

    %(prog)s                     what a run of --accelerator auto would take
    %(prog)s --device cpu --json > machine.json

Exit status: 0 when a run works here as fast as this hardware allows, 1 when something is in the way, 2 when --device is not there.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from rwkv_dpo.base.parser import OneLineParser
from rwkv_dpo.base.script import run_script


def run(arguments: Sequence[str]) -> NoReturn:
    """Runs the command, and ends the process with its status."""
    run_script(lambda: main(arguments))


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises InputError, and SystemExit where there is a fault."""
    args = parse_flags(arguments)
    from rwkv_dpo.devices.device import pick_device  # torch takes seconds; --help and typing errors don't wait
    from rwkv_dpo.machine.facts import gather
    from rwkv_dpo.machine.findings import findings
    from rwkv_dpo.machine.report import as_json_text, as_text

    facts = gather(pick_device(args.device, "--device"))
    print(as_json_text(facts) if args.json else as_text(facts))
    if any(finding.is_fault for finding in findings(facts)):
        sys.exit(1)


def build_parser() -> OneLineParser:
    """The flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="what to look at kernels for (auto)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    return parser


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises InputError."""
    return build_parser().parse_args(arguments)
