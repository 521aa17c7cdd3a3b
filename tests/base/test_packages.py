"""Scripts outside their environment."""

import subprocess
import sys
from pathlib import Path

import pytest
from rwkv_dpo.base import libraries, script
from rwkv_dpo.base.script import missing_package

SCRIPTS = Path(__file__).resolve().parents[2] / "RWKV-v5"
COMMANDS = {
    "train.py": ["--load_model", "m.pth"], "make_data.py": ["text.txt"], "evaluate.py": ["--load_model", "m.pth"],
    "prepare_pairs.py": ["--source", "p.json", "--load_model", "m.pth"], "chat.py": ["--load_model", "m.pth"],
    "export.py": ["--load_model", "m.pth", "--out", "x.pth"], "blindtest.py": ["--load_model", "m.pth", "n.pth"], "doctor.py": [],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_without_packages_a_script_ends_in_one_line_that_says_what_to_type(tmp_path, name):
    """-I -S: an interpreter that finds nothing but the standard library."""
    command = [sys.executable, "-I", "-S", str(SCRIPTS / name), *COMMANDS[name]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{name}: the Python package ")
    assert line.endswith(("/.venv/bin/activate", "/requirements.txt"))
    assert list(tmp_path.iterdir()) == []


def test_every_script_is_among_them():
    assert set(COMMANDS) == {path.name for path in SCRIPTS.glob("*.py")}


def test_the_advice_fits_the_interpreter(tmp_path, monkeypatch):
    error = ModuleNotFoundError("No module named 'pytorch_lightning'", name="pytorch_lightning.callbacks")
    for module in (script, libraries):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    # An installed package has no requirements.txt.
    assert missing_package(error).endswith(f"; install it: {sys.executable} -m pip install rwkv-dpo")
    (tmp_path / "requirements.txt").touch()
    assert missing_package(error) == (
        f"the Python package pytorch_lightning is missing in {sys.executable}; install it: {sys.executable} -m pip install -r "
        f"{tmp_path}/requirements.txt"
    )
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    assert missing_package(error).endswith(f"; activate the environment first: source {tmp_path}/.venv/bin/activate")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert "; install it: " in missing_package(error)


def test_a_module_of_our_own_that_is_missing_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError, match="nonsense"):
        missing_package(ModuleNotFoundError("No module named 'rwkv_dpo.nonsense'", name="rwkv_dpo.nonsense"))
