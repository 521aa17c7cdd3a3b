#!/usr/bin/env python3
"""Trains an RWKV-5 model on a corpus, on preference pairs, or on both: `train.py --help`."""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_dpo.errors import InputError
from rwkv_dpo.flags import parse_flags


def main() -> int:
    try:
        config, given = parse_flags(sys.argv[1:])
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        from rwkv_dpo.training.trainer import train  # torch and Lightning take seconds; --help and typing errors don't wait

        train(config, given)
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
