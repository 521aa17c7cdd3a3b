"""Adapters in a model, made by the peft library: few new weights beside matrices that stay as they are."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.base.libraries import quiet_bitsandbytes
from rwkv_dpo.files.atomic import atomic_folder
from rwkv_dpo.model.checkpoint import Weights
from rwkv_dpo.model.linear import Linear
from rwkv_dpo.model.quantized import QuantizedLinear, quantize, quantized
from rwkv_dpo.model.rwkv import RWKV, Head
from rwkv_dpo.tuning.adapter_files import SavedAdapter, write_adapter
from rwkv_dpo.tuning.base import KEY as BASE_KEY
from rwkv_dpo.tuning.settings import TuningSettings

# --train_extra: which official names each word stands for.
EXTRAS = {
    "time": r".*\.(time_.*|x_[rwkvag]|[wavg][0-2]|k_[ka]|r_k)",
    "lowrank": r".*\.([wavg]|time_maa_w|time_decay_w)[12]",
    "ln": r"(.*\.)?ln(\d|_x|_out)\..*", "emb": r"emb\.weight", "head": r"head\.weight",
}  # fmt: skip
# Power iterations of PiSSA's truncated SVD. Any precision would do: what A and B lack, the frozen rest has.
_PISSA_ITERATIONS = 16


@dataclass(frozen=True)
class AdapterPlan:
    """modules: projections that get an adapter, "blocks.0.att.key"; extra: official names of weights trained beside it."""

    method: str
    r: int
    alpha: int
    dropout: float
    modules: tuple[str, ...]
    extra: tuple[str, ...]


@dataclass(frozen=True)
class Adapter:
    """The adapter of `model`. start: PiSSA's first A and B by their names in a file, whose product the matrices lack. base_sha256: of the
    file with the model's own weights, "" when unknown."""

    model: RWKV
    plan: AdapterPlan
    config: Any  # peft.LoraConfig
    start: dict[str, Tensor]
    base_sha256: str = ""

    def save(self, trained: Weights, folder: Path, label: str) -> None:
        """Writes folder/adapter-{label} from the trained parameters, by their names in the model."""
        with atomic_folder(folder / f"adapter-{label}") as unfinished:
            self.write(trained, unfinished)

    def write(self, trained: Weights, folder: Path) -> None:
        """A PiSSA adapter becomes the LoRA of twice the rank that does the same to the original matrices: B A - B0 A0."""
        tensors = peft_library().get_peft_model_state_dict(self.model, state_dict=dict(trained), save_embedding_layers=False)
        config = copy.copy(self.config)
        if self.plan.method == "pissa":
            config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
            for name, first in self.start.items():
                now = tensors[name].cpu()
                tensors[name] = torch.cat([now, first]) if ".lora_A." in name else torch.cat([now, -first], dim=1)
        tensors |= {name: trained[name] for name in self.plan.extra}
        of_base = {BASE_KEY: self.base_sha256} if self.base_sha256 else {}
        write_adapter(folder, config, {"method": self.plan.method, **of_base}, tensors)


def peft_library() -> Any:
    """peft, imported where it is used: it takes seconds."""
    quiet_bitsandbytes()
    import peft

    return peft


def plan_adapter(
    model: RWKV, method: str, r: int, alpha: int, dropout: float, targets: str, layers: str, extra: str
) -> AdapterPlan:
    """The plan that flags describe. Refuses unknown names with the list of known ones."""
    chosen = [name for name, _ in _projections(model)]
    known = sorted({part for name in chosen for part in (_half(name), name.rsplit(".", 1)[1])})
    # RWKV-7 lacks a gate.
    words = ",".join(word for word in targets.split(",") if word in known) if targets == TuningSettings.lora_targets else targets
    wanted = _words("--lora_targets", words, known)
    if not wanted:
        refuse(f"--lora_targets is empty; accepted are {', '.join(known)}")
    numbers = parse_layers(layers, model.shape.n_layer)
    chosen = [name for name in chosen if (_half(name) in wanted or name.rsplit(".", 1)[1] in wanted) and int(name.split(".")[1]) in numbers]
    names = extra_names(model, _words("--train_extra", extra, list(EXTRAS)))
    return AdapterPlan(method, r, alpha, dropout, tuple(chosen), names)


def parse_layers(text: str, n_layer: int) -> set[int]:
    """Layer numbers of "0-3,8"; all for ""."""
    numbers: set[int] = set()
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < n_layer:
            refuse(f"--lora_layers {part}: not layers of this model; numbers and ranges within 0-{n_layer - 1} are accepted, as in 0-3,8")
        numbers |= set(range(first, last + 1))
    return numbers or set(range(n_layer))


def extra_names(model: RWKV, words: list[str]) -> tuple[str, ...]:
    """The weights that --train_extra names. InputError for a word that names none."""
    own = [name for name, _ in model.named_parameters()]
    for word in words:
        if not any(re.fullmatch(EXTRAS[word], name) for name in own):
            refuse(f"--train_extra {word}: an RWKV-{model.shape.version} has no such weights")
    return tuple(name for name in own if any(re.fullmatch(EXTRAS[word], name) for word in words))


def keep_frozen(model: RWKV, but: tuple[str, ...] = (), quant: str = "none") -> None:
    """Keeps matrices that don't train in the compute dtype, to which each product would round them, or those of the blocks in fewer bits
    (quant: as --quant); all but those named."""
    quantize(model, quant, but)
    for prefix, module in model.named_modules():
        if f"{prefix}.weight" not in but and isinstance(module, Linear | Head | nn.Embedding) and not isinstance(module, QuantizedLinear):
            module.weight.data = module.weight.data.to(model.compute_dtype)
        for name, matrix in getattr(module, "matrices", {}).items():
            if f"{prefix}.{name}" not in but:
                matrix.weight.data = matrix.weight.data.to(model.compute_dtype)


def add_adapter(model: RWKV, plan: AdapterPlan, saved: SavedAdapter | None = None, quant: str = "none") -> Adapter:
    """Puts an adapter into the model, at its start (which changes nothing the model computes) or as it was saved. quant: the form of the
    matrices that stay as they are, as --quant; with PiSSA, of what it leaves of them (QPiSSA: arXiv:2404.02948)."""
    peft = peft_library()
    from rwkv_dpo.tuning.adapted_linear import NAME, AdaptedLinear

    smallest = min(min(module.in_features, module.out_features) for name, module in _projections(model) if name in plan.modules)
    if plan.method == "pissa" and plan.r > smallest:
        refuse(f"--lora_r {plan.r}: with --peft pissa up to the smallest side of the matrices, {smallest}, is accepted")
    is_new_pissa = plan.method == "pissa" and saved is None
    config = peft.LoraConfig(
        r=plan.r, lora_alpha=plan.alpha, lora_dropout=plan.dropout, target_modules=list(plan.modules),
        use_dora=plan.method == "dora", use_rslora=plan.method == "rslora",
        init_lora_weights=f"pissa_niter_{_PISSA_ITERATIONS}" if is_new_pissa else True,
    )  # fmt: skip
    config._register_custom_module({Linear: AdaptedLinear})
    peft.inject_adapter_in_model(config, model)
    # Before the frozen matrices are rounded: what PiSSA takes out of them is more than the rest.
    start = _restore(model, plan, saved) if saved else {}
    keep_frozen(model, plan.extra, quant)
    for name, parameter in model.named_parameters():
        if name in plan.extra:
            parameter.requires_grad_()
    for module in model.modules():
        if isinstance(module, AdaptedLinear) and plan.method == "dora" and saved is None:
            # Once more: the matrices may have been rounded since.
            module.lora_magnitude_vector[NAME].weight.data = module.row_norms()
    if is_new_pissa:
        start = {name: x.detach().cpu().clone() for name, x in _adapter_tensors(model).items()}
    return Adapter(model, plan, config, start)


@torch.no_grad()
def _restore(model: RWKV, plan: AdapterPlan, saved: SavedAdapter) -> dict[str, Tensor]:
    """Sets the adapter's weights; takes PiSSA's start out of the matrices, and returns it."""
    now, start = saved.split()
    own = _adapter_tensors(model)
    wrong = [f"{name} {tuple(now[name].shape)} instead of {tuple(x.shape)}" for name, x in own.items() if now[name].shape != x.shape]
    if wrong:
        refuse(f"{saved.path}: for a model of another shape: {wrong[0]}{f' and {len(wrong) - 1} more' if wrong[1:] else ''}")
    peft_library().set_peft_model_state_dict(model, now)
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    for name, value in saved.extra.items():
        if name in quantized(model):
            refuse(f"{saved.path}: trains {name} as a whole, which --quant holds in fewer bits; --quant none is accepted")
        if name not in parameters or parameters[name].shape != value.shape:
            refuse(f"{saved.path}: {name} {tuple(value.shape)} is not a weight of this model")
        parameters[name].copy_(value)
    for name in plan.modules if start else ():
        base, scaling = modules[name].base_layer, plan.alpha / plan.r
        a, b = (start[f"{name}.lora_{x}.weight"].to(base.weight.device) for x in "AB")
        # In peft's order, which leaves the same bits as when the run began.
        base.weight.copy_(base.weight.to(a.dtype) - scaling * b @ a)
    return start


def merged_weights(model: RWKV) -> dict[str, Tensor]:
    """The plain model's weights by their official names, adapters merged in by peft. The model's adapters stay merged. InputError for a
    base in fewer bits, into which nothing is merged."""
    if quantized(model):
        refuse("--quant: an adapter is merged into its base as it is in its file")
    from rwkv_dpo.tuning.adapted_linear import AdaptedLinear

    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            module.merge(safe_merge=True)
    return {name.replace(".base_layer", ""): p.detach() for name, p in model.named_parameters() if ".lora_" not in name}


def _adapter_tensors(model: RWKV) -> dict[str, Tensor]:
    return peft_library().get_peft_model_state_dict(model, save_embedding_layers=False)


def _projections(model: RWKV) -> list[tuple[str, Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]


def _half(name: str) -> str:
    """att.key of blocks.0.att.key."""
    return name.split(".", 2)[2]


def _words(flag: str, text: str, known: list[str]) -> list[str]:
    words = [word for word in text.replace(" ", "").split(",") if word]
    for word in words:
        if word not in known:
            refuse(f"{flag} {word}: unknown; accepted are {', '.join(known)}")
    return words
