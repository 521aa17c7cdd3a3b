"""rwkv-dpo at a shell that completes, as bash has it: by argcomplete's own hook, which starts the command at every Tab."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rwkv_dpo.commands.door import COMMANDS
from rwkv_dpo.run.settings import FLAGS

SOURCES = Path(__file__).resolve().parents[2] / "RWKV-v5" / "src"
# What bash sets before it calls the function of a command, and reads after.
TAB = """
eval "$({python} -c 'import argcomplete; print(argcomplete.shellcode(["rwkv-dpo"]))')"
for COMP_LINE in {lines}; do
    COMP_POINT=${{#COMP_LINE}} COMP_TYPE=9 COMPREPLY=()
    _python_argcomplete rwkv-dpo
    echo "${{COMPREPLY[*]}}"
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_flags_values_and_files(tmp_path):
    (tmp_path / "rwkv-dpo").write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(SOURCES))} exec {sys.executable} -m rwkv_dpo "$@"\n')
    (tmp_path / "rwkv-dpo").chmod(0o755)
    (tmp_path / "model.pth").touch()
    wanted = {
        "rwkv-dpo ": {"-h", "--help", "--version", *COMMANDS},
        "rwkv-dpo ev": {"evaluate"},
        "rwkv-dpo doctor --": {"--help", "--device", "--json"},
        "rwkv-dpo train --dpo_": {f"--{name}" for name in FLAGS if name.startswith("dpo_")},
        "rwkv-dpo train --proj_dir out --strategy deepspeed_stage_2": {"deepspeed_stage_2", "deepspeed_stage_2_offload"},
        "rwkv-dpo export --dtype ": {"fp32", "bf16", "fp16"},
        "rwkv-dpo evaluate --load_model mod": {"model.pth"},
        "rwkv-dpo train --no_such": set(),
    }
    script = TAB.format(python=shlex.quote(sys.executable), lines=" ".join(map(shlex.quote, wanted)))
    done = subprocess.run(["bash", "-c", f"PATH=.:$PATH\n{script}"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert dict(zip(wanted, (set(line.split()) for line in done.stdout.splitlines()), strict=True)) == wanted


def test_nobody_else_waits_for_it():
    code = (
        "import sys; sys.argv = ['rwkv-dpo', 'train', '--help']; from rwkv_dpo.commands import door\n"
        "try: door.main()\nexcept SystemExit: print({'argcomplete', 'torch', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCES)}, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
