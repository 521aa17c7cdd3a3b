"""Command line -> RunConfig. Flags are the fields of RunConfig plus flags of dead experiments, which take only their neutral value."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.optimizer.length import check_trains
from rwkv_dpo.run.config import RunConfig, check
from rwkv_dpo.run.foreign_flags import translate

# Flags that the original takes for experiments that RWKV-5 World models don't use, with the values that mean "without".
NEUTRAL: dict[str, tuple[int, ...]] = {
    "pre_ffn": (0,), "head_qk": (0,), "tiny_att_dim": (0, -1), "tiny_att_layer": (-999, -1), "my_pos_emb": (0,), "my_qa_mask": (0,),
    "my_sample_len": (0,), "my_ffn_shift": (1,), "my_att_shift": (1,), "my_random_steps": (0,), "my_pile_version": (1,),
}  # fmt: skip


# Share of letters in common from which a name is taken for a slip of the fingers: n_layers, dpo_betta, but not lora for lora_r.
_NEAR = 0.85


class OneLineParser(argparse.ArgumentParser):
    """Reports faults as InputError, so that every script prints them the same way; takes no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # To argparse "--name=--" is a flag with a list of no values, not a missing value.
        for argument in sys.argv[1:] if args is None else args:
            if argument.startswith("--") and argument.endswith("=--"):
                self.error(f"{argument.removesuffix('=--')}: expected one argument, found '--'")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given, unknown = self.parse_known_args(args, namespace)
        return self.refuse_unknown(unknown[0]) if unknown else given

    def refuse_unknown(self, argument: str) -> NoReturn:
        """With the flag that may have been meant, when it is one or two letters away."""
        if not argument.startswith("-"):
            refuse(f"{argument!r}: not expected; flags look like --name value")
        name = argument.split("=")[0]
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(name.lstrip("-"), known, n=1, cutoff=_NEAR)
        refuse(f"{name}: unknown flag{f'; did you mean --{near[0]}?' if near else ''} (--help lists them all)")

    def error(self, message: str):
        refuse(message)


def parse_flags(arguments: Sequence[str]) -> tuple[RunConfig, frozenset[str]]:
    """The checked settings, and the names of the flags that were given. Raises InputError."""
    values = vars(build_parser().parse_args(translate(arguments, {f.name for f in fields(RunConfig)} | NEUTRAL.keys())))
    if values.keys() & {"devices", "gpu_ids"}:
        _resolve_devices(values)
    for name, accepted in NEUTRAL.items():
        value = values.pop(name, accepted[0])
        if value not in accepted:
            refuse(f"--{name} {value}: that experiment is not part of RWKV-5 World models; only {accepted[0]} is accepted")
    if values.get("load_model") == "0":
        values["load_model"] = ""  # as RWKV-LM's scripts say it
    config = RunConfig(**values)
    check(config)
    if not config.my_pile_stage:
        check_trains(config)
    return config, frozenset(values)


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
        values["devices"] = _count_devices(values.get("accelerator", RunConfig.accelerator))
    elif _is_number(devices):
        values["devices"] = int(devices)
    else:
        refuse(f"--devices {text!r}: {accepted}")


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def _count_devices(accelerator: str) -> int:
    if accelerator == "cpu":
        return 1
    import torch  # takes seconds, for this alone

    return max(torch.cuda.device_count(), 1)


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="train.py", argument_default=argparse.SUPPRESS, formatter_class=_Formatter,
        description="Trains an RWKV-5 model: ratio * language model + (1 - ratio) * Direct Preference Optimization.",
    )  # fmt: skip
    for f in fields(RunConfig):
        kind = _boolean if f.type in (bool, "bool") else str if f.name == "devices" else f.type
        choices = [c for c in f.metadata["choices"] if c]
        metavar = "|".join(choices) or f.name.upper()
        parser.add_argument(f"--{f.name}", type=kind, metavar=metavar, help=f"{f.metadata['help']} [{f.default!r}]")
    for name in NEUTRAL:
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    return parser


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=120)


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r}: True and False are accepted")


def flag_table() -> str:
    """The flags as a Markdown table, for README.md."""
    rows = ["| flag | default | meaning |", "|---|---|---|"]
    for f in fields(RunConfig):
        default = f"`{f.default}`" if f.default != "" else ""
        choices = ", ".join(f"`{c}`" for c in f.metadata["choices"] if c)
        rows.append(f"| `--{f.name}` | {default} | {f.metadata['help']}{f': {choices}' if choices else ''} |")
    return "\n".join(rows)
