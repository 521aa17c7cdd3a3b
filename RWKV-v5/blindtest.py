#!/usr/bin/env python3
"""Judge two models blind: `blindtest.py --help`. `rwkv-dpo blindtest` is the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_dpo.commands.door import enter

if __name__ == "__main__":
    enter("blindtest", sys.argv[1:])
