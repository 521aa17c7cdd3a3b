#!/usr/bin/env python3
"""Compare checkpoints: `evaluate.py --help`. `rwkv-dpo evaluate` is the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_dpo.commands.door import enter

if __name__ == "__main__":
    enter("evaluate", sys.argv[1:])
