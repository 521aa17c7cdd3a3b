"""Packages that some flags alone need: whether they are there, what installs them, and bitsandbytes without what it says while it is
imported.

Importing them takes seconds, so that only functions that need one do.
"""

import importlib
import importlib.util
import logging
import sys
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import refuse

# Of a checkout; of an installed package a folder like any other.
ROOT = Path(__file__).resolve().parents[4]
# By the package that is imported, the extra of pyproject.toml that brings it.
EXTRAS = {
    "aiohttp": "serve", "bitsandbytes": "quant", "datasets": "datasets", "deepspeed": "deepspeed", "pyarrow": "datasets",
    "tensorboard": "tensorboard", "wandb": "wandb",
}  # fmt: skip


def check_package(package: str, needed_by: str, instead: str = "") -> None:
    """InputError where it isn't installed. needed_by: a flag or file, as it was typed. instead: what can do without."""
    if sys.modules.get(package) is None and importlib.util.find_spec(package) is None:
        refuse(f"{needed_by} needs the package {package}: {what_installs(package)}{f'; {instead}' if instead else ''}")


def what_installs(package: str) -> str:
    """The command. pip knows rwkv-dpo where it is installed, and then installs what of it is missing; in a checkout it may not be."""
    if is_checkout():
        return f"pip install {package}"
    return f"pip install 'rwkv-dpo[{EXTRAS[package]}]'" if package in EXTRAS else "pip install rwkv-dpo"


def is_checkout() -> bool:
    """Whether this runs from a checkout, not from an installed package."""
    return (ROOT / "requirements.txt").is_file()


def quiet_bitsandbytes() -> None:
    """Before anything imports it, as peft does by itself where it is installed: leaves out its warning of a 4-bit kernel for inference
    that nothing here calls."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def bitsandbytes(module: str) -> Any:
    """One of its modules, by its name within the package."""
    # Python's own table finds one that is imported already, so that this may stand in a product.
    quiet_bitsandbytes()
    return importlib.import_module(f"bitsandbytes.{module}")
