"""What torch.save wrote, read without running anything that the file brings along and in memory in proportion to it."""

import mmap
import pickletools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_dpo.base.errors import InputError, refuse
from rwkv_dpo.files.kinds import Kind, refuse_others
from rwkv_dpo.files.pickles import check_copies
from rwkv_dpo.files.torch_archives import open_archive

# What torch.save writes for numbers, texts, containers and tensors. torch's own list has more, some of which allocates whatever is
# asked for.
_NAMES = re.compile(
    r"collections\.(OrderedDict|Counter)|torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter\.Parameter"
    r"|torch(\.storage)?\.(?!Untyped|Typed|_)\w+Storage|torch\.(Size|device|(b?float|u?int|complex)\d+|bool)|_codecs\.encode"
    r"|(builtins|__builtin__)\.(set|frozenset|object|complex|slice|range)"
)
# Other names of the modules that torch's list is made of, which would be torch's, and those of modules that torch blocks. All others
# are foreign to torch, and can be stood in for.
_REFUSED = re.compile(r"(torch(?!\.optim\.|\.nn\.modules\.)|builtins|__builtin__|_codecs|sys|os|posix|nt)\b.*")
_MAX_FOREIGN = 200
CHECKPOINTS = (Kind.TORCH_DICT, Kind.TORCH, Kind.SAFETENSORS)
_OPCODES = frozenset(opcode.name for opcode in pickletools.opcodes if opcode.name not in ("STACK_GLOBAL", "INST"))


class StandIn:
    """An object of a class that was not imported: trainers save their settings beside the weights. It forgets what it is made of."""

    def __new__(cls, *_arguments: object) -> Any:
        """A dictionary in place of one of its kind."""
        # A dictionary is filled by the unpickler, which fills nothing else.
        return {} if cls.__name__.lower().endswith("dict") else super().__new__(cls)

    def __init__(self, *_arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def load_torch(path: Path) -> Any:
    """The content of a .pth file, tensors on the CPU, memory-mapped where the file's form allows; objects of foreign classes become
    StandIns. InputError for a file that is truncated, names what may not be named, or promises more than it holds."""
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        is_zip, archive = content[:4] == b"PK\3\4", open_archive(content, _OPCODES)
        check_copies(archive.pickled)
        foreign = sorted(name for name in archive.names if not _NAMES.fullmatch(name))
        if refused := [name for name in foreign if _REFUSED.fullmatch(name)] or foreign[_MAX_FOREIGN:]:
            raise ValueError(f"it names {refused[0]}")
        with torch.serialization.safe_globals([_stand_in(name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    # A damaged file can fail anywhere in torch, zipfile or the unpickler, and they promise no particular exception.
    except Exception as error:
        refuse_others(path, "a checkpoint", CHECKPOINTS)
        # torch puts advice to trust the file before its reason.
        text = str(error).strip().rpartition("WeightsUnpickler error: ")[2]
        reason = text.split("\n")[0] or type(error).__name__
        raise InputError(f"{path}: not a readable .pth file of plain tensors ({reason})") from error


def check_stored(tensors: Iterable[Tensor], path: Path) -> None:
    """Refuses tensors that don't lie in the file, number for number: read from it they can have any shape with no storage, or repeat
    one number."""
    tensors = list(tensors)
    n_bytes = sum(value.numel() * value.element_size() for value in tensors)
    if any(value.device.type != "cpu" or value.layout != torch.strided for value in tensors) or n_bytes > path.stat().st_size:
        refuse(f"{path}: its tensors have {n_bytes} bytes and the file {path.stat().st_size}; tensors that share memory are not accepted")


def _stand_in(full_name: str) -> type:
    module, _, name = full_name.rpartition(".")
    return type(name, (StandIn,), {"__module__": module, "__qualname__": name})
