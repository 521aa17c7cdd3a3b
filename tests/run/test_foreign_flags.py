"""What users of other programs type: taken where it means the same, else answered with what there is here."""

import dataclasses
import inspect

import pytest
import pytorch_lightning as pl
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.run.flags import NEUTRAL, parse_flags
from rwkv_dpo.run.foreign_flags import FLAGS, REFUSED, VALUES
from rwkv_dpo.run.rules import check
from rwkv_dpo.run.settings import FLAGS as OUR_FLAGS
from rwkv_dpo.run.settings import settings_of
from rwkv_dpo.training.module import CLIP_NORM

BASE = ["--load_model", "m.pth"]


@pytest.mark.parametrize(("typed", "expected"), [
    # TRL and LLaMA-Factory
    ("--learning_rate 5e-7 --beta 0.1", {"lr_init": 5e-7, "dpo_beta": 0.1}),
    ("--per_device_train_batch_size 2 --gradient_accumulation_steps 4", {"micro_bsz": 2, "accumulate_grad_batches": 4}),
    ("--output_dir out2 --model_name_or_path m.pth", {"proj_dir": "out2"}),
    ("--bf16 True --gradient_checkpointing True --seed 7", {"precision": "bf16", "grad_cp": "1", "random_seed": 7}),
    ("--bf16 --gradient_checkpointing", {"precision": "bf16", "grad_cp": "1"}),
    ("--fp16 False --tf32 false", {}),
    ("--optim adamw_torch --adam_beta1 0.8 --adam_beta2 0.95 --adam_epsilon 1e-6",
     {"optim": "adamw", "beta1": 0.8, "beta2": 0.95, "adam_eps": 1e-6}),
    ("--pref_beta 0.2 --pref_loss sigmoid --stage dpo --finetuning_type lora --lora_rank 16",
     {"dpo_beta": 0.2, "dpo_loss": "sigmoid", "peft": "lora", "lora_r": 16}),
    ("--finetuning_type full --stage pt --data_file x", {"peft": "none", "dpo": 0, "data_file": "x"}),
    ("--max_grad_norm 1.0 --local_rank=0 --local-rank 1 --report_to none --lr_scheduler_type exponential", {}),
    ("--report_to tensorboard", {"tensorboard": 1}),
    ("--adapter_name_or_path lora/adapter-final --peft lora", {"peft_load": "lora/adapter-final", "peft": "lora"}),
    # Lightning
    ("--precision bf16-mixed --gradient_clip_val 1.0 --seed_everything 3", {"precision": "bf16", "random_seed": 3}),
    ("--precision 16-mixed", {"precision": "fp16"}), ("--precision 16", {"precision": "fp16"}), ("--precision 32", {"precision": "fp32"}),
    ("--precision 32-true --max_epochs -1 --logger False", {"precision": "fp32"}),
    ("--strategy deepspeed --gpus 2", {"strategy": "deepspeed_stage_2", "devices": 2}),
    # RWKV-LM, RWKV-PEFT, RWKV-LM-RLHF
    ("--lora --lora_r 64 --lora_alpha 128 --lora_dropout 0.01",
     {"peft": "lora", "lora_r": 64, "lora_alpha": 128, "lora_dropout": 0.01}),
    ("--PISSA --lora_r 8", {"peft": "pissa", "lora_r": 8}),
    ("--train_type state", {"peft": "state"}), ("--train_type states", {"peft": "state"}), ("--state_tune", {"peft": "state"}),
    ("--train_type none --quant none --loss_mask none --dataload get --data_shuffle 1 --avg_loss 0", {"quant": "none"}),
    ("--peft lora --quant 4bit", {"peft": "lora", "quant": "nf4"}), ("--lora --load_in_8bit", {"peft": "lora", "quant": "int8"}),
    ("--lora --quantization_bit 4", {"peft": "lora", "quant": "nf4"}), ("--quant False --load_in_4bit False", {"quant": "none"}),
    ("--lisa 0 --orpo 0 --simpo 0 --sft 0 --infctx 0 --state 0 --gpu_arch cuda", {}),
    ("--rlhf_train_file t.save --grad_cp True", {"dpo_train_file": "t.save", "grad_cp": "1"}),
    ("--grad_cp False --dpo True --overwrite false", {"grad_cp": "0", "dpo": 1, "overwrite": 0}),
    # by hand
    ("--lr 1e-3 --lr-final=1e-4 --wandb_project p", {"lr_init": 1e-3, "lr_final": 1e-4, "wandb": "p"}),
])  # fmt: skip
def test_what_means_the_same_is_taken(typed, expected):
    settings, given = parse_flags([*BASE, *typed.split()])
    assert settings == settings_of({"load_model": "m.pth", **expected})
    assert given == {"load_model", *expected}


@pytest.mark.parametrize(("typed", "message"), [
    ("--max_epochs 3", "--max_epochs 3: not a flag of train.py: --epochs N takes N passes over the pairs; --epoch_count counts"),
    ("--loss_mask qa", r"--loss_mask qa: .*pairs are scored on their answers, the corpus on every token \(none is accepted\)"),
    ("--quantization_bit 2", r"--quantization_bit 2: .*--quant nf4 or int8 .*in fewer bits, through bitsandbytes \(none is accepted\)"),
    ("--quant fp4", "--quant 'fp4': accepted are 'none', 'int8', 'nf4'"),
    ("--train_type infctx", "--chunk_ctx N trains long contexts"),
    ("--lora_config {\"lora_r\":8}", "--lora_config .*--lora_r, --lora_alpha, --lora_dropout and --peft_load are flags of their own"),
    ("--lora_parts=att,ffn,time,ln", "--lora_parts att,ffn,time,ln: .*--train_extra"),
    ("--gradient_clip_val 0.5", r"--gradient_clip_val 0.5: .*clipped to a norm of 1, as in RWKV-LM \(1 is accepted\)"),
    ("--precision bf16-true", "--precision 'bf16-true': weights are kept in fp32 here; bf16 and fp16"),
    ("--max_length 1024", "--max_length 1024: .*prepare_pairs.py --ctx_len"),
    ("--rpo_alpha 1.0", "--rpo_alpha 1.0: .*--dpo_loss sigmoid,sft --dpo_loss_weights 1,A"),
    ("--loss_type kto", "--dpo_loss kto: accepted are sigmoid, "),
    ("--lr_scheduler_type cosine", "--my_exit_tokens"),
    ("--data_type jsonl", "--data_type 'jsonl': accepted are .*a file of text shows by itself"),
    ("--learning_rate 1e-4 --lr_init 2e-4", "--lr_init and --learning_rate both mean --lr_init, and say 2e-4 and 1e-4"),
    ("--bf16 True --precision fp16", "--precision and --bf16 both mean --precision, and say fp16 and bf16"),
    ("--output_dir", "argument --proj_dir: expected one argument"),
    ("learning_rate 1e-4", "'learning_rate': not expected; flags look like --name value"),
    ("n_layer 3", "'n_layer': not expected"),
])  # fmt: skip
def test_what_means_another_thing_is_answered_with_what_there_is(typed, message):
    with pytest.raises(InputError, match=message) as error:
        parse_flags([*BASE, *typed.split()])
    assert "did you mean" not in str(error.value)


def test_a_harmless_flag_is_taken_with_a_line(caplog):
    assert parse_flags([*BASE, "--logging_steps", "10"])[0] == settings_of({"load_model": "m.pth"})
    assert caplog.messages == ["--logging_steps 10: taken, and changes nothing; metrics.jsonl has every step"]


def test_the_same_flag_twice_under_two_names_with_one_value_is_fine():
    assert parse_flags([*BASE, "--learning_rate", "1e-4", "--lr_init", "1e-4"])[0].optimizer.lr_init == 1e-4


@pytest.mark.parametrize("name", ["gradient_clip_val", "max_grad_norm"])
def test_the_norm_that_is_accepted_is_the_one_that_is_used(name):
    assert [float(value) for value in FLAGS[name].neutral] == [CLIP_NORM]


OURS = OUR_FLAGS.keys() | NEUTRAL.keys()
DEFAULTS = settings_of({}).as_flags()


def answer(name):
    """What a flag of that name gets from train.py, with a value that nobody has."""
    try:
        parse_flags([*BASE, f"--{name}", "no-such-value"])
    except InputError as error:
        return str(error)
    return ""


def test_no_flag_of_lightnings_trainer_gets_a_misleading_hint():
    names = set(inspect.signature(pl.Trainer).parameters) - OURS
    assert {name: answer(name) for name in names if "did you mean" in answer(name)} == {}
    assert {"max_epochs", "max_steps", "gradient_clip_val", "logger", "default_root_dir", "fast_dev_run"} <= names & FLAGS.keys()


def test_no_flag_of_transformers_gets_a_misleading_hint_and_ours_are_real():
    transformers = pytest.importorskip("transformers")
    names = {f.name for f in dataclasses.fields(transformers.TrainingArguments)} - OURS
    assert {name: answer(name) for name in names if "did you mean" in answer(name)} == {}
    known = {
        "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "output_dir", "bf16", "fp16",
        "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "gradient_checkpointing", "logging_steps", "save_steps",
        "save_total_limit", "eval_strategy", "eval_steps", "report_to", "seed", "lr_scheduler_type", "deepspeed", "local_rank",
    }  # fmt: skip
    assert known - {"local_rank"} <= names
    assert known <= FLAGS.keys()


def test_the_table_names_flags_and_values_that_there_are():
    assert not OURS & FLAGS.keys(), "a flag of our own needs no entry"
    for name, here in FLAGS.items():
        assert name == name.lower()
        assert here.same in OURS | {""}
        for meaning in here.values.values():
            flag, _, value = meaning.removeprefix("--").partition(" ")
            check(settings_of({"load_model": "m.pth", "data_file": "x", "peft": "lora", flag: type(DEFAULTS[flag])(value)}))
    for flag, spelled in VALUES.items():
        for value in spelled.values():
            needs = {"load_model": "m.pth", "peft": "lora"} if flag == "quant" else {}
            check(settings_of({"data_file": "x", "chunk_ctx": 16, **needs, flag: type(DEFAULTS[flag])(value)}))
    assert REFUSED.keys() <= OURS
