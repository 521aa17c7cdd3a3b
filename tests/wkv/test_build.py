"""Building a kernel on first use."""

import os
import subprocess
import sys

import pytest
from rwkv_dpo.wkv.build import missing_tool

CODE = """
import sys
from pathlib import Path
from rwkv_dpo.wkv import build
build.SOURCES = Path(sys.argv[1])
print(build.load_library("seven.cpp").seven())
"""


@pytest.mark.skipif(missing_tool("ninja", "c++") is not None, reason="needs ninja and a C++ compiler")
def test_a_build_that_was_killed_holds_up_no_later_run(tmp_path):
    (tmp_path / "seven.cpp").write_text('extern "C" int seven() { return 7; }\n')
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "builds")}

    def run() -> str:
        return subprocess.run(
            [sys.executable, "-c", CODE, str(tmp_path)], env=environment, capture_output=True, text=True, check=True, timeout=120
        ).stdout

    assert run() == "7\n"
    (folder,) = (tmp_path / "builds").iterdir()
    (folder / "lock").touch()
    assert run() == "7\n"
