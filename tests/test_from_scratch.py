"""docs/getting-started.md, "A small RWKV-7 from scratch", as a newcomer runs it: its lines as they stand, in the shell."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_lines_lead_from_nothing_to_the_rwkv_package(tmp_path):
    page = (ROOT / "docs/getting-started.md").read_text("utf-8").partition("## A small RWKV-7 from scratch")[2]
    lines = re.search(r"```sh\n(.*?)```", page, re.S)[1]
    for name in ("RWKV-v5", "default_text_document.bin", "default_text_document.idx"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["bash", "-euo", "pipefail", "-c", lines]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "preference accuracy" in done.stdout
    # The logits that the package makes of the exported file.
    assert re.search(r"tensor\(\[[- ]*\d+\.\d+", done.stdout[-500:])
