#!/usr/bin/env python3
"""Talk to a checkpoint, or have it answer prompts: `chat.py --help`. `rwkv-dpo chat` is the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))

from rwkv_dpo.commands.door import enter

if __name__ == "__main__":
    enter("chat", sys.argv[1:])
