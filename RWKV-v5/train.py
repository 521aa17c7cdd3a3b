#!/usr/bin/env python3
"""Train an RWKV model on a corpus, on preference pairs, or on both: `train.py --help`. `rwkv-dpo train` is the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_dpo.commands.door import enter

if __name__ == "__main__":
    enter("train", sys.argv[1:])
