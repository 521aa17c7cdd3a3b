"""What --peft trains: from flags, or from a file or folder that an earlier run wrote, to a model that is ready for it."""

from dataclasses import replace
from pathlib import Path

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.model.quantized import quantize
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.tuning.adapter_files import SavedAdapter, read_adapter
from rwkv_dpo.tuning.adapters import Adapter, AdapterPlan, add_adapter, keep_frozen, plan_adapter
from rwkv_dpo.tuning.base import check_base
from rwkv_dpo.tuning.settings import TuningSettings
from rwkv_dpo.tuning.states import States, add_states, read_states

Tuning = Adapter | States


def begin_tuning(
    model: RWKV, settings: TuningSettings, given: frozenset[str], start: str = "", base: str = "", base_sha256: str = ""
) -> Tuning | None:
    """Adds to the model what --peft trains, at its start, and freezes the rest. None with --peft none.

    If training continues from a file (--peft_load, or `start` before it), the file decides; given flags must agree. A run that is
    taken up again gives what it saved as its start: PiSSA's matrices come from there, not from another decomposition.
    base, base_sha256: the file with the model's weights, and what is in it; "" where that isn't known.
    """
    if settings.peft == "none":
        return None
    start = start or settings.peft_load
    tuning = _begin(model, settings, given, start)
    if start and base_sha256:
        check_base(start, base, settings.any_base == 1, base_sha256)
    return replace(tuning, base_sha256=base_sha256)


def _begin(model: RWKV, settings: TuningSettings, given: frozenset[str], start: str) -> Tuning:
    if settings.peft == "state":
        return add_states(model, read_states(start, model) if start else None, settings.quant)
    plan = plan_of(model, settings)
    if not start:
        return add_adapter(model, plan, quant=settings.quant)
    saved = read_adapter(start)
    check_modules(model, saved)
    _check_given(plan, saved, given)
    extra = tuple(dict.fromkeys((*saved.extra, *plan.extra)))
    return add_adapter(model, AdapterPlan(saved.method, saved.r, saved.alpha, plan.dropout, saved.modules, extra), saved, settings.quant)


def plan_of(model: RWKV, settings: TuningSettings) -> AdapterPlan:
    """The adapter that flags ask for."""
    s = settings
    return plan_adapter(model, s.peft, s.lora_r, s.lora_alpha, s.lora_dropout, s.lora_targets, s.lora_layers, s.train_extra)


def keep_small(model: RWKV, settings: TuningSettings) -> None:
    """Puts the matrices of an empty model that --peft won't train into the compute dtype or the form of --quant, so that they never stand
    in fp32 beside the file they are loaded from. PiSSA takes its start from fp32 matrices; which of embedding and head a folder trains
    shows later."""
    if settings.peft not in ("none", "pissa"):
        quantize(model, settings.quant, has_values=False)
        may_train = settings.peft != "state" and (settings.train_extra or settings.peft_load)
        keep_frozen(model, ("emb.weight", "head.weight") if may_train else ())


def load_tuned(model: RWKV, path: str | Path, base: str | Path = "", any_base: bool = False, quant: str = "none") -> RWKV:
    """Adds an adapter folder or a state file to a model that is to be run, and puts its matrices into the form of --quant. Refuses one of
    another base model than the file `base`, from which the model comes, unless any_base."""
    if Path(path).is_dir():
        saved = read_adapter(path)
        check_modules(model, saved)
        add_adapter(model, AdapterPlan(saved.method, saved.r, saved.alpha, 0.0, saved.modules, tuple(saved.extra)), saved, quant)
    else:
        add_states(model, read_states(path, model), quant)
    if base:
        check_base(path, base, any_base)
    return model.requires_grad_(False).eval()


def check_modules(model: RWKV, saved: SavedAdapter) -> None:
    """Refuses an adapter of modules that the model hasn't."""
    own = {name for name, _ in model.named_modules()}
    unknown = [name for name in saved.modules if name not in own]
    if unknown:
        refuse(f"{saved.path}: an adapter of another model: this one has no {unknown[0]} (layers 0-{model.shape.n_layer - 1})")


def _check_given(plan: AdapterPlan, saved: SavedAdapter, given: frozenset[str]) -> None:
    wrong = [f"--peft {plan.method} (it holds {saved.method})"] if plan.method != saved.method else []
    for flag, wanted, found in (("lora_r", plan.r, saved.r), ("lora_alpha", plan.alpha, saved.alpha)):
        if flag in given and wanted != found:
            wrong.append(f"--{flag} {wanted} (it has {found})")
    if given & {"lora_targets", "lora_layers"} and set(plan.modules) != set(saved.modules):
        odd = sorted(set(plan.modules) ^ set(saved.modules))[0]
        wrong.append(f"--lora_targets and --lora_layers ({odd} is {'not in it' if odd in plan.modules else 'in it'})")
    if wrong:
        refuse(f"{saved.path}: contradicts {', '.join(wrong)}")
