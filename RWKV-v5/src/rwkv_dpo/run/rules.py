"""The rules between settings: what is refused although each value on its own is accepted."""

from collections.abc import Callable
from typing import NamedTuple

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.objective.settings import AOT, BY_SUMS, DIVERGENT, SMOOTHED, WEIGHTED, ObjectiveSettings
from rwkv_dpo.run.settings import RunSettings
from rwkv_dpo.training.settings import OF_PAIRS
from rwkv_dpo.tuning.settings import ADAPTER_FLAGS, TuningSettings

# RWKV-LM's staged pre-training counts epochs of this many windows.
PILE_EPOCH_WINDOWS = 40320


class Rule(NamedTuple):
    """broken: whether settings break it. words: the refusal."""

    broken: Callable[[RunSettings], object]
    words: Callable[[RunSettings], str]


def check(settings: RunSettings) -> None:
    """Refuse settings that make no sense, alone or in combination, by the flag's name. Raises InputError."""
    settings.check_values()
    for rule in RULES:
        if rule.broken(settings):
            refuse(rule.words(settings))
    check_adapter_flags(settings.tuning)


def check_adapter_flags(tuning: TuningSettings) -> None:
    """Refuse flags of an adapter if none is trained."""
    if tuning.peft in ("none", "state"):
        for name in ADAPTER_FLAGS:
            if getattr(tuning, name) != getattr(TuningSettings, name):
                refuse(f"--{name} {getattr(tuning, name)}: --peft {tuning.peft} trains no adapter; --peft lora, dora, pissa and rslora do")


def check_trains(s: RunSettings) -> None:
    """Refuse a run without steps. With staged pre-training they are known once its folder has been read."""
    length, epochs = s.length, s.epochs
    if length.total_steps:
        return
    if epochs.my_exit < length.epoch_begin:
        refuse(f"--my_exit {epochs.my_exit}: nothing would be trained, because the run begins with epoch {length.epoch_begin}")
    if not length.n_epochs:
        refuse(
            f"--my_pile_stage {s.general.my_pile_stage}: {s.folder.path} already holds the last of its {epochs.epoch_count} epochs; "
            "nothing is "
            "left to train"
        )
    refuse(
        f"--my_exit_tokens {epochs.my_exit_tokens}: nothing would be trained: the epochs before {length.epoch_begin} took "
        f"{length.first_step} optimizer steps, and these tokens allow {length.exit_steps}"
    )


def _whole_steps(s: RunSettings) -> str:
    e = s.epochs
    below = e.epoch_steps // e.accumulate_grad_batches * e.accumulate_grad_batches
    return (
        f"--epoch_steps {e.epoch_steps} is not a multiple of --accumulate_grad_batches {e.accumulate_grad_batches}: "
        f"the last optimizer step of an epoch would have a smaller weight; {below or e.accumulate_grad_batches} is accepted"
    )


def _beside_a_whole_model(s: RunSettings) -> str:
    name, value = ("my_pile_stage", s.general.my_pile_stage) if s.general.my_pile_stage else ("load_partial", s.model.load_partial)
    return f"--{name} {value}: --peft {s.tuning.peft} needs a checkpoint with all weights"


def _unusable_option(s: RunSettings) -> str:
    """The refusal of an option that some or all of the preference losses can't use; "" if all is well."""
    objective, losses = s.objective, s.objective.losses
    divergence = f"--dpo_f_divergence {objective.dpo_f_divergence}"
    # (option, whether it is at its default, losses that use it)
    options = (
        ("dpo_label_smoothing", not objective.dpo_label_smoothing, SMOOTHED),
        ("simpo_gamma", objective.simpo_gamma == ObjectiveSettings.simpo_gamma, ("simpo",)),
        ("dpop_lambda", objective.dpop_lambda == ObjectiveSettings.dpop_lambda, ("dpop",)),
    )
    for name, is_default, takers in options:
        if not (is_default or set(losses) & set(takers)):
            return f"--{name} {getattr(objective, name)}: --dpo_loss {objective.dpo_loss} has no use for it; {', '.join(takers)} do"
    others = [loss for loss in losses if loss not in DIVERGENT]
    if objective.dpo_f_divergence != "reverse_kl" and others:
        return f"{divergence}: --dpo_loss {others[0]} does not compare two answers by a divergence; {', '.join(DIVERGENT)} do"
    if objective.dpo_ld_alpha != 1 and not set(losses) <= set(BY_SUMS):
        return f"--dpo_ld_alpha {objective.dpo_ld_alpha}: --dpo_loss {objective.dpo_loss} has no use for it; {', '.join(BY_SUMS)} do"
    if objective.dpo_wpo and not set(losses) <= set(WEIGHTED):
        return f"--dpo_wpo 1: --dpo_loss {objective.dpo_loss} has no weights of pairs; {', '.join(WEIGHTED)} have"
    if objective.dpo_ld_alpha != 1 and objective.dpo_ref == "file":
        return (
            f"--dpo_ld_alpha {objective.dpo_ld_alpha}: pair files only hold the reference's sums over whole answers; --dpo_ref recompute "
            "computes the weighted sums"
        )
    if objective.dpo_f_divergence != "alpha" and objective.dpo_f_alpha != ObjectiveSettings.dpo_f_alpha:
        return f"--dpo_f_alpha {objective.dpo_f_alpha}: {divergence} has none; --dpo_f_divergence alpha has"
    return ""


def _of_moving_reference(s: RunSettings) -> str:
    """The refusal of --dpo_sync_ref, or of its share, if no reference can move; "" if all is well."""
    o, peft = s.objective, s.tuning.peft
    if not o.dpo_sync_ref:
        alpha = o.dpo_sync_alpha
        return f"--dpo_sync_alpha {alpha} needs --dpo_sync_ref" if alpha != ObjectiveSettings.dpo_sync_alpha else ""
    for is_broken, words in (
        (not (o.uses_pairs and o.uses_reference), f"--dpo_loss {o.dpo_loss} uses no reference, or no pairs are trained on"),
        (o.dpo_ref != "recompute", "only a reference that --dpo_ref recompute has scored can move"),
        (s.epochs.epoch_begin, f"with --epoch_begin {s.epochs.epoch_begin} it is unknown where the reference had moved to"),
        (s.devices.strategy.startswith("deepspeed_stage_3"), f"--strategy {s.devices.strategy} shards the weights; ddp, deepspeed_stage_2 "
            "don't"),
        (peft not in ("none", "state") and o.dpo_sync_alpha != 1,
         f"the mean of two --peft {peft} adapters is not the mean of their models; --dpo_sync_alpha 1 takes the policy as the reference"),
    ):  # fmt: skip
        if is_broken:
            return f"--dpo_sync_ref {o.dpo_sync_ref}: {words}"
    return ""


def _of_held_out(s: RunSettings) -> str:
    """The refusal of a flag of evaluations if there is nothing to evaluate; "" if all is well."""
    h, pairs, corpus, prompts = s.held_out, s.data.dpo_valid_file, s.data.valid_data_file, s.held_out.sample_prompts
    needs_pairs, defaults = h.keep_best in OF_PAIRS, type(h)
    # (flag, what it needs, whether that is given)
    for name, needs, has in (
        ("eval_every", "--dpo_valid_file, --valid_data_file or --sample_prompts", pairs or corpus or prompts),
        ("eval_pairs", "--dpo_valid_file", pairs), ("eval_windows", "--valid_data_file", corpus),
        ("keep_best", "--dpo_valid_file" if needs_pairs else "--valid_data_file", pairs if needs_pairs else corpus),
        ("early_stop", "--dpo_valid_file or --valid_data_file", pairs or corpus),
        *((name, "--sample_prompts", prompts) for name in ("sample_tokens", "sample_temperature", "sample_top_p")),
    ):  # fmt: skip
        if getattr(h, name) != getattr(defaults, name) and not has:
            return f"--{name} {getattr(h, name)} needs {needs}"
    return ""


RULES = (
    Rule(_unusable_option, _unusable_option),
    Rule(_of_moving_reference, _of_moving_reference),
    Rule(
        lambda s: len(s.objective.loss_weights) != len(s.objective.losses),
        lambda s: f"--dpo_loss_weights {s.objective.dpo_loss_weights}: {len(s.objective.loss_weights)} for the {len(s.objective.losses)} "
                  f"of --dpo_loss {s.objective.dpo_loss}",
    ),
    Rule(
        lambda s: "exo_pair" in s.objective.losses and not s.objective.dpo_label_smoothing,
        lambda s: "--dpo_loss exo_pair needs --dpo_label_smoothing above 0; its paper uses 0.001",
    ),
    Rule(
        lambda s: s.objective.dpo and not s.objective.dpo_beta > 0,
        lambda s: f"--dpo_beta {s.objective.dpo_beta}: more than 0 is accepted",
    ),
    Rule(lambda s: s.epochs.epoch_steps % s.epochs.accumulate_grad_batches, _whole_steps),
    Rule(
        lambda s: s.objective.uses_corpus and not s.data.data_file and s.data.data_type != "dummy",
        lambda s: "--data_file is needed for the language-model loss (--dpo 0, or --dpo_general_corpus_ratio above 0)",
    ),
    Rule(
        lambda s: s.objective.uses_pairs and not s.data.dpo_train_file,
        lambda s: "--dpo_train_file is needed with --dpo 1 and --dpo_general_corpus_ratio below 1",
    ),
    Rule(_of_held_out, _of_held_out),
    Rule(
        lambda s: s.general.my_pile_stage == 1 and s.model.load_model not in ("", "0"),
        lambda s: f"--load_model {s.model.load_model}: --my_pile_stage 1 makes initial weights; omit --load_model",
    ),
    Rule(
        lambda s: s.general.my_pile_stage and (s.general.recipe or s.epochs.epochs),
        lambda s: f"--my_pile_stage {s.general.my_pile_stage} counts its own epochs; --recipe and --epochs are for other runs",
    ),
    Rule(
        lambda s: s.batches.my_pile_shift > 0 and not s.batches.magic_prime,
        lambda s: f"--my_pile_shift {s.batches.my_pile_shift} shifts the windows of --magic_prime, which is not given",
    ),
    Rule(
        lambda s: s.general.my_pile_stage and not s.batches.magic_prime,
        lambda s: f"--my_pile_stage {s.general.my_pile_stage} needs --magic_prime",
    ),
    Rule(
        lambda s: s.general.my_pile_stage and PILE_EPOCH_WINDOWS % (s.batches.micro_bsz * s.devices.world_size),
        lambda s: f"--micro_bsz {s.batches.micro_bsz} on {s.devices.world_size} devices: --my_pile_stage needs a product that divides "
                  f"{PILE_EPOCH_WINDOWS}",
    ),
    Rule(
        lambda s: s.optimizer.optim != "adamw" and "offload" in s.devices.strategy,
        lambda s: f"--optim {s.optimizer.optim}: --strategy {s.devices.strategy} takes adamw only, whose state it keeps in host memory",
    ),
    Rule(
        lambda s: s.devices.strategy.startswith("deepspeed") and s.devices.precision == "tf32" and s.devices.accelerator == "cpu",
        lambda s: "--precision tf32 has no meaning on a CPU with DeepSpeed; fp32 and bf16 are accepted",
    ),
    Rule(
        lambda s: s.batches.chunk_ctx and s.devices.strategy.startswith("deepspeed_stage_3"),
        lambda s: f"--chunk_ctx {s.batches.chunk_ctx}: not with --strategy {s.devices.strategy}, which shards the weights; ddp, "
                  "deepspeed_stage_2 do",
    ),
    Rule(
        lambda s: s.batches.tbptt and not s.batches.chunk_ctx,
        lambda s: "--tbptt 1 cuts gradients between chunks: it needs --chunk_ctx",
    ),
    Rule(
        lambda s: s.batches.batch_tokens and s.objective.uses_pairs and set(s.objective.losses) & set(AOT),
        lambda s: f"--batch_tokens {s.batches.batch_tokens}: --dpo_loss {s.objective.dpo_loss} sorts all pairs of a micro-batch, whose "
            "samples --batch_tokens distributes; 0 is accepted",
    ),
    Rule(
        lambda s: 0 < s.batches.batch_tokens < s.data.ctx_len and s.objective.uses_corpus,
        lambda s: f"--batch_tokens {s.batches.batch_tokens}: a corpus window has {s.data.ctx_len} tokens (--ctx_len); at least that many "
            "are accepted",
    ),
    Rule(
        lambda s: s.tuning.peft == "none" and s.tuning.peft_load,
        lambda s: f"--peft_load {s.tuning.peft_load} needs the --peft that it was trained with",
    ),
    Rule(
        lambda s: s.tuning.quant != "none" and s.tuning.peft == "none",
        lambda s: f"--quant {s.tuning.quant}: --peft none trains all weights, which are fp32; --peft lora, dora, pissa, rslora "
                  "and state freeze the base",
    ),
    Rule(
        lambda s: s.tuning.peft != "none" and s.model.load_model in ("", "0"),
        lambda s: f"--peft {s.tuning.peft} needs --load_model: the frozen weights",
    ),
    Rule(lambda s: s.tuning.peft != "none" and (s.general.my_pile_stage or s.model.load_partial), _beside_a_whole_model),
    Rule(
        lambda s: s.tuning.peft == "pissa" and max(s.optimizer.weight_decay, s.optimizer.weight_decay_final) > 0,
        lambda s: "--weight_decay with --peft pissa would shrink the model's own principal directions; 0 is accepted",
    ),
    Rule(
        # It gathers a module's weights for the backward pass only if the module's input has a gradient.
        lambda s: s.tuning.peft != "none" and s.devices.strategy.startswith("deepspeed_stage_3"),
        lambda s: f"--strategy {s.devices.strategy}: DeepSpeed doesn't shard weights that --peft freezes; stages 1 and 2, and ddp, "
                  "are accepted",
    ),
)  # fmt: skip
