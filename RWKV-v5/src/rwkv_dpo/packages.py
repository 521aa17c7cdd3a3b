"""Scripts in an interpreter that lacks a package: one line says which, and what to type."""

import sys
from pathlib import Path
from typing import NoReturn

_ROOT = Path(__file__).resolve().parents[3]


def missing_package(error: ModuleNotFoundError) -> str:
    """The line. Raises the error when it is a module of our own that is missing."""
    package = (error.name or str(error)).partition(".")[0]
    if package in ("", "rwkv_dpo"):
        raise error
    activate = _ROOT / ".venv" / "bin" / "activate"
    if activate.is_file() and Path(sys.prefix).resolve() != activate.parents[1].resolve():
        advice = f"activate the environment first: source {activate}"
    else:
        advice = f"install it: {sys.executable} -m pip install -r {_ROOT / 'requirements.txt'}"
    return f"the Python package {package} is missing in {sys.executable}; {advice}"


def leave_without(error: ModuleNotFoundError) -> NoReturn:
    """Ends a script whose imports fail, as run_script would."""
    print(f"{Path(sys.argv[0]).name}: {missing_package(error)}", file=sys.stderr)
    sys.exit(2)
