"""bitsandbytes, which some flags need: whether it is there, and its modules without what it says while they are imported.

Importing it takes seconds, so that only functions that need it do.
"""

import importlib
import importlib.util
import logging
from typing import Any

from rwkv_dpo.base.errors import refuse


def check_bitsandbytes(flag: str, instead: str) -> None:
    """InputError where it isn't installed. flag: what needs it, as it was typed. instead: what can do without."""
    if importlib.util.find_spec("bitsandbytes") is None:
        refuse(f"{flag} needs the package bitsandbytes (pip install bitsandbytes); {instead}")


def quiet_bitsandbytes() -> None:
    """Before anything imports it, as peft does by itself where it is installed: leaves out its warning of a 4-bit kernel for inference
    that nothing here calls."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def bitsandbytes(module: str) -> Any:
    """One of its modules, by its name within the package."""
    # Python's own table finds one that is imported already, so that this may stand in a product.
    quiet_bitsandbytes()
    return importlib.import_module(f"bitsandbytes.{module}")
