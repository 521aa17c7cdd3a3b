#!/usr/bin/env python3
"""Look at this machine, and say what a run would take: `doctor.py --help`. `rwkv-dpo doctor` is the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_dpo.commands.door import enter

if __name__ == "__main__":
    enter("doctor", sys.argv[1:])
