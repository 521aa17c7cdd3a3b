#!/usr/bin/env python3
"""Make pair files of a preference data set: `prepare_pairs.py --help`. `rwkv-dpo prepare` is the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_dpo.commands.door import enter

if __name__ == "__main__":
    enter("prepare_pairs", sys.argv[1:])
