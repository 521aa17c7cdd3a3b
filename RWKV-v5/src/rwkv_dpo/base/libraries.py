"""Packages that only some flags need: whether they are installed, how to install them, and bitsandbytes without the output of its import.

Importing them takes seconds, so that only functions that need one do.
"""

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import refuse

# In a checkout; for an installed package it is a folder like any other.
ROOT = Path(__file__).resolve().parents[4]
# By imported package: the extra of pyproject.toml that installs it.
EXTRAS = {
    "aiohttp": "serve", "bitsandbytes": "quant", "datasets": "datasets", "deepspeed": "deepspeed", "pyarrow": "datasets",
    "tensorboard": "tensorboard", "wandb": "wandb",
}  # fmt: skip


def check_package(package: str, needed_by: str, instead: str = "") -> None:
    """Raises InputError if it isn't installed. needed_by: a flag or file, as it was typed. instead: what works without it."""
    if sys.modules.get(package) is None and importlib.util.find_spec(package) is None:
        refuse(f"{needed_by} needs the package {package}: {what_installs(package)}{f'; {instead}' if instead else ''}")


def what_installs(package: str) -> str:
    """The command that installs it. pip knows rwkv-dpo if it is installed, and then installs what is missing; in a checkout it may not know
    it."""
    if is_checkout():
        return f"pip install {package}"
    return f"pip install 'rwkv-dpo[{EXTRAS[package]}]'" if package in EXTRAS else "pip install rwkv-dpo"


def is_checkout() -> bool:
    """Whether this runs from a checkout, not from an installed package."""
    return (ROOT / "requirements.txt").is_file()


def quiet_bitsandbytes() -> None:
    """To be called before anything imports it, which peft does by itself if it is installed: drop its warning about a 4-bit inference
    kernel that nothing here calls."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def bitsandbytes(module: str) -> Any:
    """One of its modules, by its name within the package."""
    # Python's own table returns a module that is already imported, so this call is cheap enough for every product.
    quiet_bitsandbytes()
    return importlib.import_module(f"bitsandbytes.{module}")
