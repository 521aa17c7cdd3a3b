#!/usr/bin/env python3
"""Merge adapters, and convert checkpoints: `export.py --help`. `rwkv-dpo export` is the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_dpo.commands.door import enter

if __name__ == "__main__":
    enter("export", sys.argv[1:])
