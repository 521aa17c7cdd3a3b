"""Check this machine, and show what a run would use: GPU, driver, compilers, whether each kernel builds and agrees with plain PyTorch,
memory, disk, and how to fix each problem.

    %(prog)s                     what a run with --accelerator auto would use
    %(prog)s --device cpu --json > machine.json

Exit status: 0 if a run is as fast as this hardware allows, 1 if there is a problem, 2 if --device does not exist.
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
    """Run the command. Raises InputError, and SystemExit if there is a problem."""
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
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="device to check kernels for (auto)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises InputError."""
    return build_parser().parse_args(arguments)
