"""--config: flags from a file, as they would be typed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import read_utf8, refuse
from rwkv_dpo.run.settings import ROOMS

ENDINGS = (".yaml", ".yml", ".json", ".toml")
# What a run's config.json contains apart from its flags.
_CONTENT = "content"


def arguments_of(path: str) -> list[str]:
    """The command line that a file stands for: an object of flags and their values; a list is its values with commas between them. The
    config.json of a run stands for that run. InputError, naming the file."""
    named = f"--config {path}"
    found = _read(named, Path(path))
    if not isinstance(found, dict):
        refuse(f"{named}: expected flags and their values, found {type(found).__name__}")
    values = {name: _typed(named, name, value) for name, value in found.items() if name != _CONTENT and value not in (None, "null", "~")}
    return [f"--{name}={value}" for name, value in (_chosen(values) if _CONTENT in found else values).items()]


def _read(named: str, path: Path) -> Any:
    if path.suffix.lower() not in ENDINGS:
        refuse(f"{named}: accepted are {', '.join(ENDINGS)}")
    text = read_utf8(named, path)
    try:
        if path.suffix.lower() == ".json":
            return json.loads(text, parse_float=str, parse_int=str)
        if path.suffix.lower() == ".toml":
            return _toml(named)(text, parse_float=str)
        return _yaml(text)
    except (ValueError, RecursionError) as error:
        refuse(f"{named}: not {path.suffix[1:].upper()}: {' '.join(str(error).split())}")


def _yaml(text: str) -> Any:
    import yaml  # here, so that a missing package is reported like any other

    try:
        # Scalars stay as they are written: in YAML 1.1, 1e-5 is not a number, and no is false.
        return yaml.load(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _toml(named: str) -> Any:
    try:
        from tomllib import loads
    except ModuleNotFoundError:
        refuse(f"{named}: TOML needs Python 3.11 or newer; .yaml and .json don't")
    return loads


def _typed(named: str, name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        refuse(f"{named}: {name!r} holds an object; expected a value")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(_typed(named, name, one) for one in value)
    return str(int(value) if isinstance(value, bool) else value)


def _chosen(values: Mapping[str, str]) -> dict[str, str]:
    """Of all the settings of a run, after its recipe, those that differ from the defaults."""
    defaults = {f.name: _typed("", f.name, f.default) for room in ROOMS.values() for f in fields(room)}
    return {name: value for name, value in values.items() if name != "recipe" and value != defaults.get(name)}
