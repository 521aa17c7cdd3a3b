"""Which base model an adapter or a tuned state belongs to: the sha256 of its file, kept in the adapter or the state itself.

In safetensors files, an adapter's among them, it is in the metadata; in a .pth a member of the archive that torch doesn't look for.
"""

import io
import zipfile
from pathlib import Path

import torch

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.files.hashed import file_sha256, hashed_write
from rwkv_dpo.files.tensor_files import is_safetensors, read_metadata
from rwkv_dpo.model.checkpoint import Weights, save_weights
from rwkv_dpo.tuning.adapter_files import WEIGHTS as ADAPTER_WEIGHTS

KEY = "base_sha256"


def save_states(states: Weights, path: Path, base_sha256: str) -> None:
    """Writes tuned states, atomically, and which base they belong to, where that is known."""
    if path.suffix == ".safetensors" or not base_sha256:
        save_weights(states, path, {KEY: base_sha256} if base_sha256 else {})
        return
    content = io.BytesIO()
    torch.save({name: value.detach().cpu().contiguous() for name, value in states.items()}, content)
    with zipfile.ZipFile(content, "a") as archive:
        folder = archive.namelist()[0].split("/")[0]
        archive.writestr(zipfile.ZipInfo(f"{folder}/{KEY}"), base_sha256)
    with hashed_write(path) as file:
        file.write(content.getvalue())


def base_of(path: str | Path) -> str:
    """The sha256 of the base model of an adapter folder or a state file that its reader has accepted; "" when it doesn't say."""
    path = Path(path)
    file = path / ADAPTER_WEIGHTS if path.is_dir() else path
    if is_safetensors(file):
        return read_metadata(file).get(KEY, "")
    if not zipfile.is_zipfile(file):
        return ""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/{KEY}")]
        return archive.read(names[0])[:64].decode("ascii", "replace") if names else ""


def check_base(path: str | Path, base: str | Path, any_base: bool, sha256: str = "") -> None:
    """Refuses an adapter or a state of another base model than the file `base`, whose sha256 is computed where it isn't given."""
    trained_on = "" if any_base else base_of(path)
    if trained_on and trained_on != (sha256 or file_sha256(base)):
        refuse(f"{path}: was trained on another base model (sha256 {trained_on[:12]}...) than {base}; --any_base 1 accepts it anyway")
