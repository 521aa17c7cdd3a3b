"""Command line -> RunSettings. Flags are the fields of the rooms' settings, and flags of abandoned experiments, which accept only their
neutral value."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.base.parser import HelpFormatter, OneLineParser
from rwkv_dpo.devices.settings import DeviceSettings
from rwkv_dpo.run.config_file import ENDINGS, arguments_of
from rwkv_dpo.run.foreign_flags import translate
from rwkv_dpo.run.rules import check, check_trains
from rwkv_dpo.run.settings import FLAGS, ROOMS, RunSettings, settings_of

# Flags of the original for experiments that World models don't use, with the values that mean "without".
NEUTRAL: dict[str, tuple[int, ...]] = {
    "pre_ffn": (0,), "head_qk": (0,), "tiny_att_dim": (0, -1), "tiny_att_layer": (-999, -1), "my_pos_emb": (0,), "my_qa_mask": (0,),
    "my_sample_len": (0,), "my_ffn_shift": (1,), "my_att_shift": (1,), "my_random_steps": (0,), "my_pile_version": (1,),
}  # fmt: skip


def parse_flags(arguments: Sequence[str]) -> tuple[RunSettings, frozenset[str]]:
    """The checked settings, and the names of the flags that were given. Raises InputError."""
    values = _values_of(arguments)
    if values.keys() & {"devices", "gpu_ids"}:
        _resolve_devices(values)
    for name, accepted in NEUTRAL.items():
        value = values.pop(name, accepted[0])
        if value not in accepted:
            refuse(f"--{name} {value}: that experiment is not part of RWKV World models; only {accepted[0]} is accepted")
    if values.get("load_model") == "0":
        values["load_model"] = ""  # as RWKV-LM's scripts say it
    settings = settings_of(values)
    if settings.general.recipe:
        settings.check_values()  # the rest when the recipe has set what it sets, from which --lora_r may follow
    else:
        check(settings)
        if not settings.general.my_pile_stage:
            check_trains(settings)
    return settings, frozenset(values)


def _values_of(arguments: Sequence[str]) -> dict[str, Any]:
    """By flag; what is typed takes precedence over --config."""
    own = OneLineParser(add_help=False, argument_default=argparse.SUPPRESS)
    own.add_argument("--config")
    files, typed = own.parse_known_args(arguments)
    known, parser, values = FLAGS.keys() | NEUTRAL.keys(), build_parser(), {}
    if path := getattr(files, "config", ""):
        try:
            values = vars(parser.parse_args(translate(arguments_of(path), known)))
        except InputError as error:
            refuse(str(error) if str(error).startswith("--config") else f"--config {path}: {error}")
    return values | vars(parser.parse_args(translate(typed, known)))


def _resolve_devices(values: dict[str, Any]) -> None:
    """--devices as Lightning's users write it: a number, auto (or -1), or the numbers of GPUs, which --gpu_ids takes as well."""
    text = values.pop("devices", "")
    devices, ids = text.strip("[]() "), values.get("gpu_ids", "").strip("[]() ")
    if "," in devices or not devices:
        devices, ids = "", ids or devices
    accepted = "a number of devices, auto, or different numbers of GPUs such as 0,2 are accepted"
    if ids:
        numbers = [number.strip() for number in ids.removesuffix(",").split(",")]
        if not all(map(_is_number, numbers)) or len(set(map(int, numbers))) < len(numbers):
            refuse(f"--devices {ids}: {accepted}")
        if devices not in ("", str(len(numbers))):
            refuse(f"--devices {devices} --gpu_ids {ids}: those are {len(numbers)}")
        values.update(devices=len(numbers), gpu_ids=",".join(numbers))
    elif devices in ("auto", "-1"):
        values["devices"] = _count_devices(values.get("accelerator", DeviceSettings.accelerator))
    elif _is_number(devices):
        values["devices"] = int(devices)
    else:
        refuse(f"--devices {text!r}: {accepted}")


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def _count_devices(accelerator: str) -> int:
    if accelerator == "cpu":
        return 1
    import torch  # takes seconds, and only this needs it

    return max(torch.cuda.device_count(), 1)


def build_parser() -> OneLineParser:
    """The parser of train.py: a group for each room."""
    parser = OneLineParser(
        argument_default=argparse.SUPPRESS, formatter_class=HelpFormatter,
        description="Trains an RWKV model (versions 5, 6 and 7): ratio * language model + (1 - ratio) * Direct Preference Optimization.",
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE", help=f"a file of flags ({', '.join(ENDINGS)}), or a run's config.json; typed flags take precedence"
    )
    for room in ROOMS.values():
        group = parser.add_argument_group(room.TITLE)  # type: ignore[attr-defined]  # every room has one
        for f in fields(room):
            kind = _boolean if f.type is bool else str if f.name == "devices" else f.type
            flag = FLAGS[f.name]
            metavar = "|".join(filter(None, flag.choices)) or f.name.upper()
            group.add_argument(f"--{f.name}", type=kind, metavar=metavar, help=f"{flag.help} [{f.default!r}]")  # type: ignore[arg-type]
    for name in NEUTRAL:
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    return parser


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r}: True and False are accepted")


def flag_table() -> str:
    """The flags as Markdown tables, one per room, for docs/flags.md."""
    return "\n\n".join(_table_of(room) for room in ROOMS.values())


def _table_of(room: type) -> str:
    rows = [f"## {room.TITLE.capitalize()}\n", "| flag | default | meaning |", "|---|---|---|"]  # type: ignore[attr-defined]
    for f in fields(room):
        flag = FLAGS[f.name]
        default = f"`{f.default}`" if f.default != "" else ""
        choices = ", ".join(f"`{choice}`" for choice in flag.choices if choice)
        rows.append(f"| `--{f.name}` | {default} | {flag.help}{f': {choices}' if choices else ''} |")
    return "\n".join(rows)
