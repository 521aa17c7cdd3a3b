"""The settings of a training run: one frozen dataclass whose fields are the flags, and the checks between them."""

from dataclasses import dataclass, field, fields
from typing import Any

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.optimizer.schedule import Schedule

# RWKV-LM's staged pre-training counts epochs of this many windows.
PILE_EPOCH_WINDOWS = 40320


def flag(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class RunConfig:
    """Field names are flag names; the order is the order of --help and of README's table."""

    load_model: str = flag("", "checkpoint (.pth) to start from; empty: make initial weights and save them as rwkv-init.pth")
    proj_dir: str = flag("out", "folder for checkpoints, logs and config.json")
    overwrite: int = flag(0, "1: use a proj_dir that holds a run with other settings")
    dry_run: int = flag(0, "1: don't train, print the parameters, the estimated peak memory by part and what each memory flag would save")
    wandb: str = flag("", "Weights & Biases project; empty: don't use it")
    random_seed: int = flag(-1, "seed of initial weights, sampling and dropout; -1: 0")

    data_file: str = flag("", "general corpus, tokens or text; not needed with --dpo 1 --dpo_general_corpus_ratio 0")
    data_type: str = flag("utf-8", "what data_file is; when not given, what the file shows itself to be", (
        "utf-8", "utf-16le", "numpy", "binidx", "dummy", "uint16",
    ))  # fmt: skip
    vocab_size: int = flag(0, "vocabulary; 0: from the checkpoint, else the characters of the text; 65536: the World's, and text goes "
                              "through its tokenizer")  # fmt: skip
    ctx_len: int = flag(1024, "tokens in a corpus window")

    dpo: int = flag(1, "1: preference training; 0: plain language-model training")
    dpo_train_file: str = flag("trainset.save", "preference pairs to train on")
    dpo_valid_file: str = flag("", "preference pairs to evaluate at the end of every epoch; empty: none")
    dpo_ref: str = flag("file", "the reference model: file: that which scored the pair files; recompute: the model as training starts, "
                        "which scores them before the first step", ("file", "recompute"))  # fmt: skip
    dpo_beta: float = flag(0.01, "strength of the pull towards the reference model")
    dpo_general_corpus_ratio: float = flag(0.0, "r in loss = r * language model + (1 - r) * DPO; 0: pairs only, 1: corpus only")

    n_layer: int = flag(6, "layers (taken from the checkpoint when one is loaded)")
    n_embd: int = flag(512, "width (from the checkpoint, likewise)")
    dim_att: int = flag(0, "width of the time mix; 0: n_embd")
    dim_ffn: int = flag(0, "width of the channel mix; 0: 3.5 * n_embd rounded down to a multiple of 32")
    head_size_a: int = flag(64, "size of a head, a multiple of 8 up to 128")
    head_size_divisor: int = flag(8, "what the group norm divides its input by")
    dropout: float = flag(0.0, "dropout after every half block")
    load_partial: int = flag(0, "1: weights that the checkpoint lacks keep their initial values")
    my_testing: str = flag("", "model version as RWKV-LM spells it", ("", "r3r4", "x052"))
    peft: str = flag("none", "what is trained: every weight; an adapter of few weights beside them; or the state that sequences begin from",
                     ("none", "lora", "dora", "pissa", "rslora", "state"))  # fmt: skip
    lora_r: int = flag(32, "rank of the adapter's matrices")
    lora_alpha: int = flag(64, "scale of the adapter: it adds alpha / r times its product (rslora: alpha / sqrt(r))")
    lora_dropout: float = flag(0.0, "dropout of the adapter's input")
    lora_targets: str = flag("receptance,key,value,gate,output", "projections with an adapter; att.key or ffn.key for one half alone")
    lora_layers: str = flag("", "layers with an adapter, such as 0-11 or 0,5-7; empty: all")
    train_extra: str = flag("", "weights trained in full beside the adapter: any of time, ln, emb, head")
    peft_load: str = flag("", "adapter folder, or with --peft state a state file, to go on from")
    any_base: int = flag(0, "1: take a peft_load that was trained on another base model than load_model")

    epoch_steps: int = flag(1000, "micro-batches on each device in an epoch; a multiple of accumulate_grad_batches")
    epoch_count: int = flag(500, "epochs to train")
    epoch_begin: int = flag(0, "number of the first epoch, when continuing from a checkpoint")
    epoch_save: int = flag(5, "save rwkv-{epoch}.pth every so many epochs; 0: only at the end")
    micro_bsz: int = flag(12, "corpus windows, and pairs, in a micro-batch on each device")
    accumulate_grad_batches: int = flag(1, "micro-batches in an optimizer step")
    resume: str = flag("auto", "auto: an interrupted run of proj_dir with these settings goes on; none: begin anew; else a file of last/")
    save_every: int = flag(0, "save all that a run needs to go on, into last/, every so many optimizer steps; 0: after every epoch")
    keep: int = flag(2, "how many of those checkpoints stay")
    max_bad_steps: int = flag(10, "stop after so many optimizer steps in a row whose loss or gradient is not finite")

    lr_init: float = flag(6e-4, "learning rate after warm-up")
    lr_final: float = flag(1e-5, "learning rate at the last step")
    warmup_steps: int = flag(-1, "optimizer steps of warm-up, from a fifth of the rate; -1: none")
    beta1: float = flag(0.9, "Adam")
    beta2: float = flag(0.99, "Adam")
    adam_eps: float = flag(1e-8, "Adam")
    optim: str = flag("adamw", "AdamW's moments, by bytes a trainable parameter: adamw fp32, 8; adamw_bf16state bf16 rounded "
                      "stochastically, 4; adamw8bit 8-bit by bitsandbytes, 2", ("adamw", "adamw8bit", "adamw_bf16state"))  # fmt: skip
    weight_decay: float = flag(0.0, "decay of the matrices, decoupled (AdamW)")
    weight_decay_final: float = flag(-1.0, "weight decay at the last step; -1: constant")
    layerwise_lr: int = flag(1, "1: time_decay learns twice as fast; 0: one rate for all")

    my_pile_stage: int = flag(0, "RWKV-LM's staged pre-training: 1 makes initial weights, 2 and 3 go on from the newest checkpoint")
    magic_prime: int = flag(0, "visit the corpus windows in RWKV-LM's magic_prime order; 0: seeded random order")
    my_pile_shift: int = flag(-1, "tokens by which magic_prime windows are shifted; -1: 0")
    my_pile_edecay: int = flag(0, "epochs at lr_init before the decay begins")
    my_exit: int = flag(99999999, "stop after the epoch of this number")
    my_exit_tokens: int = flag(0, "stop after this many corpus tokens, with a cosine schedule (negative: cosine and exponential averaged)")

    accelerator: str = flag("gpu", "where to train; auto: a GPU when there is one", ("gpu", "cuda", "cpu", "auto"))
    devices: int = flag(1, "devices, or processes on a CPU, on each node; auto: all GPUs, or one process on a CPU; 0,2: those GPUs")
    gpu_ids: str = flag("", "which GPUs, as --devices 0,2 says it too; empty: the first ones")
    num_nodes: int = flag(1, "machines")
    strategy: str = flag("auto", "how devices work together", (
        "auto", "ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_2_offload",
        "deepspeed_stage_3_offload",
    ))  # fmt: skip
    balance: str = flag("tokens", "deal pairs so that all devices have equally many tokens, by taking pairs of like length together; "
                        "none: in seeded random order", ("none", "tokens"))  # fmt: skip
    ds_bucket_mb: int = flag(200, "size of DeepSpeed's communication buckets, in millions of gradients (4 MB, in fp16 2); no larger than "
                             "all that train")  # fmt: skip
    precision: str = flag("fp16", "arithmetic; fp16 and bf16 keep fp32 master weights", ("fp32", "tf32", "fp16", "bf16"))
    grad_cp: str = flag("0", "1: recompute each block in the backward pass (least memory, a third more time); selective: only what is "
                        "cheap (a quarter less memory, a few per cent more time)", ("0", "1", "selective"))  # fmt: skip
    chunk_ctx: int = flag(0, "N of at least 16: run windows and pairs in chunks of N tokens with the same gradient, rounding aside, in the "
                          "memory of one chunk and a state at each border, for one more forward pass; 0: whole")  # fmt: skip
    tbptt: int = flag(0, "1: with --chunk_ctx, states carry no gradients from chunk to chunk: an approximation that spares windows the "
                      "additional pass, and stores nothing at borders")  # fmt: skip
    wkv_backend: str = flag("auto", "implementation of the WKV recurrence", ("auto", "reference", "chunked", "cpu", "cuda"))
    cpu_malloc: int = flag(1, "1: a CPU run keeps freed memory for the next step (faster, up to half as much again); 0: gives it back")
    enable_progress_bar: bool = flag(True, "show a progress bar")

    @property
    def seed(self) -> int:
        return max(self.random_seed, 0)

    @property
    def uses_corpus(self) -> bool:
        return not self.dpo or self.dpo_general_corpus_ratio > 0

    @property
    def uses_pairs(self) -> bool:
        return bool(self.dpo) and self.dpo_general_corpus_ratio < 1

    @property
    def ratio(self) -> float:
        """Weight of the language-model loss."""
        return self.dpo_general_corpus_ratio if self.dpo else 1.0

    @property
    def world_size(self) -> int:
        return self.devices * self.num_nodes

    @property
    def last_epoch(self) -> int:
        """The epoch before which the run stops. Staged pre-training counts epoch_count from epoch 0."""
        end = self.epoch_count if self.my_pile_stage >= 2 else self.epoch_begin + self.epoch_count
        return max(min(end, self.my_exit + 1), self.epoch_begin)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        return self.epoch_steps // self.accumulate_grad_batches

    @property
    def exit_steps(self) -> int:
        """Optimizer steps that cover my_exit_tokens; 0 without."""
        tokens_per_step = self.ctx_len * self.micro_bsz * self.world_size * self.accumulate_grad_batches
        return -(-abs(self.my_exit_tokens) // tokens_per_step)

    @property
    def first_step(self) -> int:
        """The schedule's step at which this run begins."""
        return self.epoch_begin * self.steps_per_epoch if self.my_pile_stage >= 2 else 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps that this run takes."""
        steps = (self.last_epoch - self.epoch_begin) * self.steps_per_epoch
        return min(steps, max(self.exit_steps - self.first_step, 0)) if self.my_exit_tokens else steps

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            lr_init=self.lr_init,
            lr_final=self.lr_final,
            warmup_steps=self.warmup_steps,
            total_steps=self.first_step + (self.last_epoch - self.epoch_begin) * self.steps_per_epoch,
            hold_steps=self.my_pile_edecay * self.steps_per_epoch,
            cosine_steps=self.exit_steps,
            blend_cosine=self.my_exit_tokens < 0,
            weight_decay=self.weight_decay,
            weight_decay_final=self.weight_decay_final,
        )


_AT_LEAST_ONE = (
    "ctx_len", "n_layer", "n_embd", "head_size_a", "head_size_divisor", "epoch_steps", "epoch_count", "micro_bsz",
    "accumulate_grad_batches", "devices", "num_nodes", "ds_bucket_mb", "keep", "max_bad_steps", "lora_r", "lora_alpha",
)  # fmt: skip
_SWITCHES = ("any_base", "overwrite", "dry_run", "dpo", "load_partial", "layerwise_lr", "tbptt", "cpu_malloc")
_NOT_NEGATIVE = (
    "vocab_size", "dim_att", "dim_ffn", "epoch_begin", "epoch_save", "lr_init", "lr_final", "adam_eps", "weight_decay", "magic_prime",
    "my_pile_edecay", "save_every",
)  # fmt: skip
_BELOW_ONE = ("beta1", "beta2", "dropout", "lora_dropout")
_ADAPTER_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets", "lora_layers", "train_extra")
_SMALLEST, _LARGEST = 1e-100, 2**63 - 1


def check(config: RunConfig) -> None:
    """Refuses settings that make no sense, alone or together, by the flag's name."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        if choices and value not in choices:
            if f.name == "my_testing" and value.startswith("x0"):
                refuse(f"--my_testing {value}: that model version isn't supported; accepted are '' (RWKV-5), r3r4, x052")
            refuse(f"--{f.name} {value!r}: accepted are {', '.join(map(repr, choices))}")
    for name in _AT_LEAST_ONE:
        if getattr(config, name) < 1:
            refuse(f"--{name} {getattr(config, name)}: at least 1 is accepted")
    for name in _SWITCHES:
        if getattr(config, name) not in (0, 1):
            refuse(f"--{name} {getattr(config, name)}: 0 and 1 are accepted")
    for name in _NOT_NEGATIVE:
        if not getattr(config, name) >= 0:
            refuse(f"--{name} {getattr(config, name)}: 0 or more is accepted")
    for name in _BELOW_ONE:
        if not 0 <= getattr(config, name) < 1:
            refuse(f"--{name} {getattr(config, name)}: from 0 up to but without 1 is accepted")
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, (int, float)) and not (value == 0 or _SMALLEST <= abs(value) <= _LARGEST):
            refuse(f"--{f.name} {str(value)[:30]}: a number between -2**63 and 2**63 is accepted, 0 or no nearer to it than {_SMALLEST}")
    c = config
    if not 0 <= c.dpo_general_corpus_ratio <= 1:
        refuse(f"--dpo_general_corpus_ratio {c.dpo_general_corpus_ratio}: 0 to 1 is accepted")
    if c.dpo and not c.dpo_beta > 0:
        refuse(f"--dpo_beta {c.dpo_beta}: more than 0 is accepted")
    if c.head_size_a % 8 or c.head_size_a > 128:
        refuse(f"--head_size_a {c.head_size_a}: multiples of 8 up to 128 are accepted")
    if c.epoch_steps % c.accumulate_grad_batches:
        below = c.epoch_steps // c.accumulate_grad_batches * c.accumulate_grad_batches
        refuse(
            f"--epoch_steps {c.epoch_steps} is not a multiple of --accumulate_grad_batches {c.accumulate_grad_batches}: "
            f"the last optimizer step of an epoch would weigh less; {below or c.accumulate_grad_batches} would do"
        )
    if c.uses_corpus and not c.data_file and c.data_type != "dummy":
        refuse("--data_file is needed for the language-model loss (--dpo 0, or --dpo_general_corpus_ratio above 0)")
    if c.uses_pairs and not c.dpo_train_file:
        refuse("--dpo_train_file is needed with --dpo 1 and --dpo_general_corpus_ratio below 1")
    if c.my_pile_stage not in (0, 1, 2, 3):
        refuse(f"--my_pile_stage {c.my_pile_stage}: 0, 1, 2 and 3 are accepted")
    if c.my_pile_stage == 1 and c.load_model not in ("", "0"):
        refuse(f"--load_model {c.load_model}: --my_pile_stage 1 makes initial weights; leave it out")
    if c.my_pile_shift < -1:
        refuse(f"--my_pile_shift {c.my_pile_shift}: -1 (none), and 0 or more tokens are accepted")
    if c.my_pile_shift > 0 and not c.magic_prime:
        refuse(f"--my_pile_shift {c.my_pile_shift} shifts the windows of --magic_prime, which is not given")
    if c.my_pile_stage and not c.magic_prime:
        refuse(f"--my_pile_stage {c.my_pile_stage} needs --magic_prime")
    if c.my_pile_stage and PILE_EPOCH_WINDOWS % (c.micro_bsz * c.world_size):
        refuse(f"--micro_bsz {c.micro_bsz} on {c.world_size} devices: --my_pile_stage needs a product that divides {PILE_EPOCH_WINDOWS}")
    if c.optim != "adamw" and "offload" in c.strategy:
        refuse(f"--optim {c.optim}: --strategy {c.strategy} takes adamw only, whose state it keeps in host memory")
    if c.strategy.startswith("deepspeed") and c.precision == "tf32" and c.accelerator == "cpu":
        refuse("--precision tf32 means nothing on a CPU with DeepSpeed; fp32, bf16 are accepted")
    if c.chunk_ctx != 0 and c.chunk_ctx < 16:
        refuse(f"--chunk_ctx {c.chunk_ctx}: 0 (off), and 16 or more tokens are accepted")
    if c.chunk_ctx and c.strategy.startswith("deepspeed_stage_3"):
        refuse(f"--chunk_ctx {c.chunk_ctx}: not with --strategy {c.strategy}, which shares out the weights; ddp, deepspeed_stage_2 do")
    if c.tbptt and not c.chunk_ctx:
        refuse("--tbptt 1 cuts gradients between chunks: it needs --chunk_ctx")
    check_peft(c)


def check_peft(c: RunConfig) -> None:
    """What --peft needs, and what it can't be combined with."""
    if c.peft in ("none", "state"):
        for name in _ADAPTER_FLAGS:
            if getattr(c, name) != RunConfig.__dataclass_fields__[name].default:
                refuse(f"--{name} {getattr(c, name)}: --peft {c.peft} has no adapter; --peft lora, dora, pissa and rslora have")
    if c.peft == "none":
        if c.peft_load:
            refuse(f"--peft_load {c.peft_load} needs the --peft that it was trained with")
        return
    if c.load_model in ("", "0"):
        refuse(f"--peft {c.peft} needs --load_model: the weights that stay as they are")
    if c.my_pile_stage or c.load_partial:
        name = "my_pile_stage" if c.my_pile_stage else "load_partial"
        refuse(f"--{name} {getattr(c, name)}: --peft {c.peft} trains beside the weights of a whole checkpoint")
    if c.peft == "pissa" and max(c.weight_decay, c.weight_decay_final) > 0:
        refuse("--weight_decay with --peft pissa would shrink the model's own main directions; 0 is accepted")
    if c.strategy.startswith("deepspeed_stage_3"):
        # It gathers a module's weights for the backward pass only where the module's input has a gradient.
        refuse(f"--strategy {c.strategy}: DeepSpeed doesn't share out weights that --peft freezes; stages 1 and 2, and ddp, are accepted")
