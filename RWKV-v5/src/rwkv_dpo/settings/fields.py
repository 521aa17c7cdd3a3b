"""A setting as its room declares it: a dataclass field with its flag's help, accepted values, and part in a run's identity."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, NamedTuple

from rwkv_dpo.base.errors import refuse


class Part(Enum):
    """The part of a setting in the identity of a run."""

    RESULT = "decides what the run ends with"
    INCIDENTAL = "has no influence on the result"
    CONTINUATION = "changes when a run continues the epochs of another"
    LAYOUT = "may change when a run is resumed: how the work is divided, and into how many samples it is cut"


class Accepts(NamedTuple):
    """Which values a setting accepts, and the words that a refusal uses."""

    holds: Callable[[Any], bool]
    words: str


AT_LEAST_ONE = Accepts(lambda value: value >= 1, "at least 1 is accepted")
NOT_NEGATIVE = Accepts(lambda value: value >= 0, "0 or more is accepted")
BELOW_ONE = Accepts(lambda value: 0 <= value < 1, "0 or more and below 1 is accepted")
SHARE = Accepts(lambda value: 0 <= value <= 1, "0 to 1 is accepted")
SWITCH = Accepts(lambda value: value in (0, 1), "0 and 1 are accepted")

# Larger numbers overflow, and numbers closer to 0 vanish, somewhere in the arithmetic.
_SMALLEST, _LARGEST = 1e-100, 2**63 - 1


@dataclass(frozen=True)
class Flag:
    """The metadata of a field, under "flag". names_file: its value is the path of something that the run reads."""

    help: str
    accepts: tuple[Accepts, ...]
    choices: tuple[str, ...]
    part: Part
    names_file: bool


def flag(
    default: Any, help: str, *accepts: Accepts, choices: tuple[str, ...] = (), part: Part = Part.RESULT, names_file: bool = False
) -> Any:
    """A field of a room's settings; its name is the flag's."""
    return field(default=default, metadata={"flag": Flag(help, accepts, choices, part, names_file)})


def flags_of(room: Any) -> dict[str, Flag]:
    """The flags of a room's settings, an instance or the class, by name."""
    return {f.name: f.metadata["flag"] for f in fields(room)}


def check_values(room: Any) -> None:
    """Refuse the first value of a room's settings that its flag doesn't accept. Raises InputError."""
    for name, flag in flags_of(room).items():
        value = getattr(room, name)
        for accepts in flag.accepts:
            if not accepts.holds(value):
                refuse(f"--{name} {value}: {accepts.words}")
        if flag.choices and value not in flag.choices:
            refuse(f"--{name} {value!r}: accepted are {', '.join(map(repr, flag.choices))}")
        if isinstance(value, (int, float)) and not (value == 0 or _SMALLEST <= abs(value) <= _LARGEST):
            refuse(f"--{name} {str(value)[:30]}: a number between -2**63 and 2**63 is accepted, 0 or a magnitude of at least {_SMALLEST}")
