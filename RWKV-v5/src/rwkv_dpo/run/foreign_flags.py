"""Flags and values that users of RWKV-LM, RWKV-PEFT, RWKV-LM-RLHF, Lightning, TRL and LLaMA-Factory type, and what they are here."""

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from rwkv_dpo.base.errors import refuse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Here:
    """What a flag of another program is here.

    same: our flag of the same meaning. values: what some of its values are here, as "--flag value". neutral: values that ask for what
    is done here anyway; ANY: every value, with a line of `words`. words: what there is instead, for all other values.
    """

    same: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    neutral: tuple[str, ...] = ()
    words: str = ""


ANY = "any"
_TRUE, _FALSE = ("true", "1", "yes", ""), ("none", "0", "false", "no")


def _switch(on: str) -> Here:
    """A flag that is given alone, or with True or False."""
    return Here(values=dict.fromkeys(_TRUE, on), neutral=_FALSE, words=f"here it is {on}")


def _only(words: str, *neutral: str) -> Here:
    return Here(neutral=neutral, words=words)


def _without(what: str) -> Here:
    return Here(neutral=_FALSE, words=f"{what} is not part of this program")


# Names for flags of ours.
_SAME = {
    "lr": "lr_init", "learning_rate": "lr_init", "min_lr": "lr_final", "adam_beta1": "beta1", "adam_beta2": "beta2",
    "adam_epsilon": "adam_eps", "per_device_train_batch_size": "micro_bsz", "per_gpu_train_batch_size": "micro_bsz",
    "micro_batch_size": "micro_bsz", "gradient_accumulation_steps": "accumulate_grad_batches", "gradient_checkpointing": "grad_cp",
    "output_dir": "proj_dir", "default_root_dir": "proj_dir", "overwrite_output_dir": "overwrite", "save_total_limit": "keep",
    "model_name_or_path": "load_model", "model_path": "load_model", "base_model": "load_model", "model": "load_model",
    "rlhf_train_file": "dpo_train_file", "beta": "dpo_beta", "pref_beta": "dpo_beta",
    "loss_type": "dpo_loss", "pref_loss": "dpo_loss", "loss_weights": "dpo_loss_weights", "label_smoothing": "dpo_label_smoothing",
    "ref_model_sync_steps": "dpo_sync_ref", "ref_model_mixup_alpha": "dpo_sync_alpha", "ld_alpha": "dpo_ld_alpha",
    "num_train_epochs": "epochs", "num_epochs": "epochs", "eval_steps": "eval_every",
    "f_divergence_type": "dpo_f_divergence", "f_alpha_divergence_coef": "dpo_f_alpha", "seed": "random_seed",
    "seed_everything": "random_seed", "ctx_length": "ctx_len", "context_length": "ctx_len", "block_size": "ctx_len",
    "mixed_precision": "precision", "dtype": "precision", "torch_dtype": "precision", "device": "accelerator", "gpus": "devices",
    "nnodes": "num_nodes", "wandb_project": "wandb", "finetuning_type": "peft", "lora_rank": "lora_r",
    "adapter_name_or_path": "peft_load", "rwkv_version": "my_testing", "train_stage": "my_pile_stage", "head_size": "head_size_a",
}  # fmt: skip
_PEFT_LOAD = "--peft_load takes an adapter folder of the peft library, or a state file"
_TARGETS = "--lora_targets receptance,key,value,gate,output names projections (att.key, ffn.key for one half); --train_extra others"
_QUANT = "--quant nf4 or int8 holds what --peft doesn't train in fewer bits, through bitsandbytes"
_DATA = "pairs: --dpo_train_file takes what prepare_pairs.py makes of preferences; text or tokens: --data_file"
_EVAL = "the pairs of --dpo_valid_file are evaluated after every epoch"
_MIXED = "--dpo_loss sigmoid,sft --dpo_loss_weights 1,A adds the chosen answers' loss; --dpo_general_corpus_ratio mixes in a corpus"
_LOG = "metrics.jsonl has every step"
_SAVES = "--epoch_save N saves the model every N epochs; --save_every N, every N optimizer steps, all that a run needs to go on"
# What means something else here, or nothing: names that share an answer, and the answer.
_OTHERS: tuple[tuple[str, Here], ...] = (
    ("train_type", Here(values={"state": "--peft state", "states": "--peft state"}, neutral=("none", "", "finetune"),
                        words="--peft state tunes states; --chunk_ctx N trains long contexts (infctx), truncated with --tbptt 1")),
    ("state state_tune", _switch("--peft state")),
    ("lora", _switch("--peft lora")),
    ("pissa pissa_init", _switch("--peft pissa")),
    ("use_rslora", _switch("--peft rslora")),
    ("use_dora", _switch("--peft dora")),
    ("use_peft", _only("--peft lora, dora, pissa, rslora or state", *_FALSE)),
    ("infctx", _only("--chunk_ctx N trains long contexts in chunks; --tbptt 1 cuts their gradients", *_FALSE)),
    ("lora_load load_adapter", _only(_PEFT_LOAD, "")),
    ("lora_target", _only(_TARGETS, "all")),
    ("lora_target_modules lora_parts train_parts", _only(_TARGETS)),
    ("layer_profile", _only("--lora_layers 0-11 names the layers that an adapter trains")),
    ("lora_config", _only("--lora_r, --lora_alpha, --lora_dropout and --peft_load are flags of their own")),
    ("pissa_config", _only("--peft pissa takes --lora_r, --lora_alpha and --peft_load")),
    ("svd_niter pissa_iter", _only("--peft pissa takes its start from 16 iterations", "16")),
    ("quant_mode quantization_bit",
     Here(values={"nf4": "--quant nf4", "4": "--quant nf4", "int8": "--quant int8", "8": "--quant int8"}, neutral=_FALSE, words=_QUANT)),
    ("load_in_4bit", _switch("--quant nf4")),
    ("load_in_8bit", _switch("--quant int8")),
    ("orpo", _switch("--dpo_loss orpo")),
    ("simpo", _switch("--dpo_loss simpo")),
    ("wpo use_weighting", _switch("--dpo_wpo 1")),
    ("lisa grpo sft distillation zerocot moe limited_lora lr_advanced avg_loss l2warp_sparse compile cuda_cleanup "
     "reference_free push_to_hub", _without("that")),
    ("loss_mask mask_id", _only("pairs are scored on their answers, the corpus on every token", *_FALSE)),
    ("dataload", _only("corpus windows are drawn at random, without replacement", "get")),
    ("data_shuffle random_mode", _only("samples come in a seeded random order", *_TRUE)),
    ("fla fused_kernel op kernel", _only("--wkv_backend chooses the kernel", ANY)),
    ("gpu_arch", _only("NVIDIA GPUs and CPUs are supported", "cuda")),
    ("dataset dataset_name train_file data_path train_data_file", _only(_DATA)),
    ("eval_dataset validation_file", _only("--dpo_valid_file takes the held-out pairs that prepare_pairs.py makes")),
    ("template", _only("prepare_pairs.py --templates writes prompts and answers out")),
    ("max_length max_prompt_length max_completion_length cutoff_len max_seq_length max_len rlhf_max_corpus_len",
     _only("pairs are cut by prepare_pairs.py --ctx_len, before they are scored; --ctx_len of train.py is the length of a corpus window")),
    ("ref_model", _only("--dpo_ref recompute takes the model as training starts; prepare_pairs.py --load_model scores with any other")),
    ("precompute_ref_log_probs", _only("prepare_pairs.py scores the pairs before training, or --dpo_ref recompute does", *_TRUE)),
    ("stage", Here(values={"pt": "--dpo 0"}, neutral=("dpo",), words="--dpo 1 trains on preferences, --dpo 0 a language model")),
    ("rpo_alpha pref_ftx dpo_alpha", _only(_MIXED, "0", "none")),
    ("sync_ref_model", _only("--dpo_sync_ref N moves the reference every N optimizer steps", *_FALSE)),
    ("max_epochs min_epochs",
     _only("--epochs N takes N passes over the pairs; --epoch_count counts epochs of --epoch_steps micro-batches", "-1")),
    ("max_steps", _only("a run takes epoch_count * epoch_steps / accumulate_grad_batches optimizer steps", "-1")),
    ("batch_size train_batch_size",
     _only("--micro_bsz is the batch on each device; with --accumulate_grad_batches and --devices it makes a step's")),
    ("per_device_eval_batch_size", _only("held-out pairs are scored in batches of their own", ANY)),
    ("gradient_clip_val max_grad_norm", _only("gradients are clipped to a norm of 1, as in RWKV-LM", "1")),
    ("gradient_clip_algorithm", _only("gradients are clipped by their norm", "norm")),
    ("lr_scheduler_type", _only("the rate falls exponentially to --lr_final; as a cosine with --my_exit_tokens", "exponential")),
    ("warmup_ratio", _only("--warmup_steps counts optimizer steps", "0")),
    ("bf16", _switch("--precision bf16")),
    ("fp16", _switch("--precision fp16")),
    ("tf32", _switch("--precision tf32")),
    ("pure_bf16", _only("--precision bf16 computes in bf16 and keeps fp32 weights", *_FALSE)),
    ("use_cpu no_cuda", _switch("--accelerator cpu")),
    ("deepspeed", _only("--strategy deepspeed_stage_1, _2 or _3 makes DeepSpeed's settings")),
    ("fsdp", _only("--strategy deepspeed_stage_3 shares out weights", "", *_FALSE)),
    ("replace_sampler_ddp use_distributed_sampler", _only("one order of samples, independent of devices, is dealt to them", *_FALSE)),
    ("ddp_find_unused_parameters", _only("every parameter is used", *_FALSE)),
    ("group_by_length", _only("--balance tokens (the default) takes pairs of like length together", *_TRUE)),
    ("logging_steps logging_first_step logging_strategy log_every_n_steps plot_loss", _only(_LOG, ANY)),
    ("logger", _only("--wandb PROJECT logs there, --tensorboard 1 for it; metrics.jsonl has every step anyway", *_TRUE, *_FALSE)),
    ("report_to", Here(values={"tensorboard": "--tensorboard 1"}, neutral=("none",),
                       words="--wandb PROJECT logs there, --tensorboard 1 for TensorBoard")),
    ("run_name", _only("a run is told by its --proj_dir", ANY)),
    ("save_steps", _only(_SAVES)),
    ("save_strategy", _only(_SAVES, "epoch")),
    ("enable_checkpointing", _only(_SAVES, *_TRUE)),
    ("eval_strategy evaluation_strategy", _only(_EVAL, "epoch")),
    ("check_val_every_n_epoch val_check_interval", _only(_EVAL, "1")),
    ("num_sanity_val_steps", _only(_EVAL, "0")),
    ("do_train do_eval", _only("train.py trains, and evaluates the pairs of --dpo_valid_file", *_TRUE)),
    ("enable_model_summary", _only("three lines tell what is trained on what", ANY)),
    ("fast_dev_run", _only("--dry_run 1 trains nothing, and says what a run needs; --epoch_count 1 --epoch_steps N is short", *_FALSE)),
    ("resume_from_checkpoint", _only("--resume auto (the default) continues an interrupted run; --resume FILE from a file of last/")),
    ("num_workers dataloader_num_workers preprocessing_num_workers", _only("they are chosen by what is faster", ANY)),
    ("remove_unused_columns", _only("a pair file has no columns", ANY)),
    # torch.distributed.launch and DeepSpeed's launcher add it; torchrun's environment says the same.
    ("local_rank", _only("", ANY)),
)  # fmt: skip
FLAGS = {name: Here(same=ours) for name, ours in _SAME.items()} | {name: here for names, here in _OTHERS for name in names.split()}

_SWITCH_VALUES = {"true": "1", "false": "0"}
# Values of our own flags as others spell them.
VALUES: dict[str, dict[str, str]] = {
    "precision": {
        "bf16-mixed": "bf16", "bfloat16": "bf16", "16-mixed": "fp16", "16": "fp16", "float16": "fp16", "32-true": "fp32", "32": "fp32",
        "float32": "fp32", "no": "fp32",
    },
    "optim": {
        "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "none": "adamw", "": "adamw", "adam": "adamw",
        "adamw_8bit": "adamw8bit", "adamw_bnb_8bit": "adamw8bit", "adam_8bit": "adamw8bit",
    },
    "strategy": {"deepspeed": "deepspeed_stage_2", "ddp_find_unused_parameters_false": "ddp"},
    "peft": {"full": "none"},
    "quant": {"0": "none", "false": "none", "no": "none", "": "none", "4bit": "nf4", "8bit": "int8"},
    "my_testing": {"5": "x052", "5.2": "x052", "6": "x060", "7": "x070", "v5": "x052", "v6": "x060", "v7": "x070"},
    "dpo_loss": {"dpo": "sigmoid"},
    "dpo_f_divergence": {"js_divergence": "js", "alpha_divergence": "alpha"},
    **dict.fromkeys(
        ("overwrite", "dry_run", "dpo", "load_partial", "layerwise_lr", "tbptt", "cpu_malloc", "grad_cp"), _SWITCH_VALUES
    ),
}  # fmt: skip
# Values that there are elsewhere and not here, and why.
REFUSED: dict[str, dict[str, str]] = {
    "precision": dict.fromkeys(("bf16-true", "16-true"), "weights are kept in fp32 here; bf16 and fp16, for the arithmetic, are accepted"),
    "data_type": dict.fromkeys(
        ("jsonl", "json", "txt", "text", "csv", "parquet"),
        "accepted are utf-8, utf-16le, numpy, binidx, uint16 and dummy; a file of text shows by itself what it is",
    ),
}


def translate(arguments: Sequence[str], known: Set[str]) -> list[str]:
    """The command line with flags and values of other programs as they are called here. known: our flags' names. InputError for a flag
    that means something else here, or that stands beside our own with another value."""
    ours: list[str] = []
    given: dict[str, tuple[str, str]] = {}  # our flag: how it was typed, and its value
    rest = list(arguments)
    while rest:
        typed = rest.pop(0)
        name, has_value, value = typed.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        here = FLAGS.get(name.lower()) if name not in known else None
        if not typed.startswith("--") or (name not in known and here is None):
            ours.append(typed)
            continue
        if not has_value and rest and not rest[0].startswith("--"):
            has_value, value = "=", rest.pop(0)
        typed = typed.partition("=")[0]
        if here is not None and not here.same:
            here_is = _meaning(typed, here, value)
            name, has_value, value = here_is.removeprefix("--").partition(" ") if here_is else ("", "", "")
        else:
            name = here.same if here else name
            value, has_value = ("true", "=") if not has_value and "true" in VALUES.get(name, {}) else (value, has_value)
            if why := REFUSED.get(name, {}).get(value.lower()):
                refuse(f"{typed} {value!r}: {why}")
            value = VALUES.get(name, {}).get(value.lower(), value)
        if not name:
            continue
        before, its_value = given.setdefault(name, (typed, value))
        if before != typed and its_value != value:
            refuse(f"{typed} and {before} both mean --{name}, and say {value} and {its_value}")
        ours.append(f"--{name}={value}" if has_value else f"--{name}")
    return ours


def _meaning(typed: str, here: Here, value: str) -> str:
    """What is given here, as "--flag value"; nothing for what is done anyway."""
    if ANY in here.neutral:
        if here.words:
            log.warning("%s: taken, and changes nothing; %s", f"{typed} {value}".strip(), here.words)
        return ""
    if _plain(value) in map(_plain, here.neutral):
        return ""
    shown = next(filter(None, here.neutral), "")
    accepted = f" ({shown} is accepted)" if shown else ""
    return here.values.get(value.lower()) or refuse(f"{typed} {value}".strip() + f": not a flag of train.py: {here.words}{accepted}")


def _plain(value: str) -> str:
    """1.0 as 1, whatever its form."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return value.lower()
