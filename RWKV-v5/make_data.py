#!/usr/bin/env python3
"""Make a binidx corpus of text: `make_data.py --help`. `rwkv-dpo data` is the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_dpo.commands.door import enter

if __name__ == "__main__":
    enter("make_data", sys.argv[1:])
