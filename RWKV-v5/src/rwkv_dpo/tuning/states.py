"""State tuning: the weights stay as they are; what trains is the WKV state that every sequence begins from.

Files are those of RWKV-PEFT and RWKV-Runner: a .pth of `blocks.N.att.time_state`, each [H, N, N] with the value's index before
the key's. Sources: RWKV-PEFT's cuda/wkv6state_cuda.cu (the thread of value i reads row i, key by key), and the `rwkv` package's
model.py, which transposes the last two dimensions into its own [H, key, value].
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.model.checkpoint import Weights, read_weights
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.tuning.adapters import keep_frozen
from rwkv_dpo.tuning.base import save_states


@dataclass(frozen=True)
class States:
    """The tuned states of a model. base_sha256: of the file with its weights, "" when unknown."""

    base_sha256: str = ""

    def save(self, trained: Weights, folder: Path, label: str) -> None:
        """Writes folder/state-{label}.pth."""
        save_states(trained, folder / f"state-{label}.pth", self.base_sha256)


def add_states(model: RWKV, saved: Weights | None = None, quant: str = "none") -> States:
    """Gives the model trainable first states, as saved, as its checkpoint had them or zero, and freezes everything else. quant: the form
    of its matrices, as --quant."""
    keep_frozen(model.requires_grad_(False), quant=quant)
    for layer, state in enumerate(model.add_time_states()):
        if saved is not None:
            state.data.copy_(saved[state_name(layer)])
        state.requires_grad_()
    return States()


def read_states(path: str | Path, model: RWKV) -> dict[str, Tensor]:
    """Refuses files that aren't states, or are those of a model of another shape."""
    states = read_weights(path)
    other = [name for name in states if not name.endswith(".att.time_state")]
    if "emb.weight" in states and len(other) < len(states):
        refuse(f"{path}: not a state file but a whole model with its states; --load_model takes both")
    if other:
        refuse(f"{path}: not a state file ({other[0]} is no blocks.N.att.time_state)")
    shape = model.shape
    wanted = {state_name(layer): (shape.n_head, shape.head_size, shape.head_size) for layer in range(shape.n_layer)}
    found = {name: tuple(value.shape) for name, value in states.items()}
    if found != wanted:
        odd = next(name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name))
        refuse(f"{path}: states of another model: {odd} is {found.get(odd, 'missing')}, this model has {wanted.get(odd, 'no such layer')}")
    return states


def state_name(layer: int) -> str:
    """The official name of a tuned state."""
    return f"blocks.{layer}.att.time_state"
