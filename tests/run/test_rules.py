"""Settings of which each by itself is accepted, and which make no sense together."""

import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.run.rules import RULES, check
from rwkv_dpo.run.settings import settings_of

STAGE = {"my_pile_stage": 2, "dpo": 0, "data_file": "x"}
LORA = {"peft": "lora", "load_model": "m.pth"}
MOVING = {"dpo_sync_ref": 5, "dpo_ref": "recompute"}
STAGE_3 = {"strategy": "deepspeed_stage_3"}

# In the order of RULES.
BROKEN = [
    ({"dpo_loss": "sigmoid,ipo", "dpo_label_smoothing": 0.1}, "--dpo_label_smoothing 0.1: --dpo_loss sigmoid,ipo has no use .*; cdpo, "),
    ({"dpo_sync_ref": 5}, "--dpo_sync_ref 5: only a reference that --dpo_ref recompute has scored can move"),
    ({"dpo_loss": "sigmoid,ipo", "dpo_loss_weights": "1"}, "--dpo_loss_weights 1: 1 for the 2 of --dpo_loss sigmoid,ipo"),
    ({"dpo_loss": "exo_pair"}, "--dpo_loss exo_pair needs --dpo_label_smoothing above 0; its paper uses 0.001"),
    ({"dpo_beta": 0.0}, "--dpo_beta 0.0: more than 0 is accepted"),
    ({"epoch_steps": 5, "accumulate_grad_batches": 2}, "--epoch_steps 5 is not a multiple of --accumulate_grad_batches 2: .*; 4 is"),
    ({"dpo": 0}, "--data_file is needed for the language-model loss"),
    ({"dpo_train_file": ""}, "--dpo_train_file is needed with --dpo 1"),
    ({"keep_best": "loss_dpo"}, "--keep_best loss_dpo needs --dpo_valid_file"),
    ({**STAGE, "my_pile_stage": 1, "magic_prime": 101, "load_model": "m.pth"}, "--load_model m.pth: --my_pile_stage 1 makes initial"),
    ({**STAGE, "magic_prime": 101, "micro_bsz": 1, "epochs": 2}, "--my_pile_stage 2 counts its own epochs; --recipe and --epochs are for"),
    ({"my_pile_shift": 5}, "--my_pile_shift 5 shifts the windows of --magic_prime, which is not given"),
    (STAGE, "--my_pile_stage 2 needs --magic_prime"),
    # 40,320 = 2^7 * 3^2 * 5 * 7.
    ({**STAGE, "magic_prime": 101, "micro_bsz": 11, "devices": 2}, "--micro_bsz 11 on 2 devices: .* a product that divides 40320"),
    ({"optim": "adamw8bit", "strategy": "deepspeed_stage_2_offload"}, "--optim adamw8bit: --strategy deepspeed_stage_2_offload takes"),
    ({"strategy": "deepspeed_stage_1", "precision": "tf32", "accelerator": "cpu"}, "--precision tf32 has no meaning on a CPU"),
    ({"chunk_ctx": 16, **STAGE_3}, "--chunk_ctx 16: not with --strategy deepspeed_stage_3"),
    ({"tbptt": 1}, "--tbptt 1 .* needs --chunk_ctx"),
    ({"batch_tokens": 99, "dpo_loss": "sigmoid,aot"}, "--batch_tokens 99: --dpo_loss sigmoid,aot sorts all pairs of a micro-batch, "),
    ({"batch_tokens": 99, "dpo": 0, "data_file": "x", "ctx_len": 100}, "--batch_tokens 99: a corpus window has 100 tokens"),
    ({"peft_load": "adapter-3"}, "--peft_load adapter-3 needs the --peft that it was trained with"),
    ({"quant": "nf4"}, "--quant nf4: --peft none trains all weights"),
    ({"peft": "lora"}, "--peft lora needs --load_model"),
    ({**LORA, "load_partial": 1}, "--load_partial 1: --peft lora needs a checkpoint with all weights"),
    ({**LORA, "peft": "pissa", "weight_decay_final": 0.1}, "--weight_decay with --peft pissa would shrink"),
    ({**LORA, **STAGE_3}, "--strategy deepspeed_stage_3: DeepSpeed doesn't shard weights that --peft freezes"),
]  # fmt: skip


@pytest.mark.parametrize(("i", "flags", "words"), [(i, *case) for i, case in enumerate(BROKEN)], ids=lambda case: str(case)[:60])
def test_what_breaks_one_rule_alone_is_refused_in_its_words(i, flags, words):
    settings = settings_of(flags)
    assert [bool(rule.broken(settings)) for rule in RULES] == [at == i for at in range(len(RULES))]
    with pytest.raises(InputError, match=words):
        check(settings)


@pytest.mark.parametrize(("flags", "words"), [
    ({"simpo_gamma": 1.0}, "--simpo_gamma 1.0: --dpo_loss sigmoid has no use for it; simpo do"),
    ({"dpop_lambda": 1.0, "dpo_loss": "simpo"}, "--dpop_lambda 1.0: --dpo_loss simpo has no use for it; dpop do"),
    ({"dpo_loss": "sigmoid,nca_pair", "dpo_f_divergence": "js"}, "--dpo_f_divergence js: --dpo_loss nca_pair does not compare"),
    ({"dpo_loss": "sigmoid,ipo", "dpo_ld_alpha": 0.5}, "--dpo_ld_alpha 0.5: --dpo_loss sigmoid,ipo has no use for it; sigmoid, cdpo"),
    ({"dpo_ld_alpha": 0.5}, "--dpo_ld_alpha 0.5: pair files only hold .*; --dpo_ref recompute computes the weighted sums"),
    ({"dpo_wpo": 1, "dpo_loss": "softmax"}, "--dpo_wpo 1: --dpo_loss softmax has no weights of pairs; sigmoid, "),
    ({"dpo_sync_alpha": 0.5}, "--dpo_sync_alpha 0.5 needs --dpo_sync_ref"),
    ({**MOVING, "dpo_loss": "simpo"}, "--dpo_sync_ref 5: --dpo_loss simpo uses no reference"),
    ({**MOVING, "epoch_begin": 2}, "--dpo_sync_ref 5: with --epoch_begin 2 it is unknown where the reference had moved to"),
    ({**MOVING, **STAGE_3}, "--dpo_sync_ref 5: --strategy deepspeed_stage_3 shards the weights"),
    ({**MOVING, **LORA}, "--dpo_sync_ref 5: the mean of two --peft lora adapters is not the mean of their models; --dpo_sync_alpha 1"),
    ({"dpo_f_alpha": 0.3}, "--dpo_f_alpha 0.3: --dpo_f_divergence reverse_kl has none"),
    ({"dpo_loss": "dpo"}, "--dpo_loss dpo: accepted are sigmoid, cdpo, "),
    ({"dpo_loss": "ipo,ipo"}, "--dpo_loss ipo,ipo: accepted are .*, each once"),
    ({"dpo_loss_weights": "0"}, "--dpo_loss_weights 0: numbers above 0"),
    ({"dpo_loss_weights": "x"}, "--dpo_loss_weights x: numbers above 0"),
    ({"dpo_loss": "robust", "dpo_label_smoothing": 0.5}, "--dpo_label_smoothing 0.5: 0 or more and below 0.5"),
])  # fmt: skip
def test_an_option_that_a_loss_cannot_use_is_refused_by_both_names(flags, words):
    with pytest.raises(InputError, match=words):
        check(settings_of(flags))


def test_options_that_a_loss_uses_are_accepted():
    check(settings_of({"dpo_loss": "robust, simpo", "dpo_loss_weights": "1, 0.5", "dpo_label_smoothing": 0.1, "simpo_gamma": 1.0}))
    check(settings_of({"dpo_loss": "plackett_luce", "dpo_f_divergence": "alpha", "dpo_f_alpha": 0.3}))


def test_every_rule_has_a_case_and_defaults_break_none():
    assert len(BROKEN) == len(RULES)
    check(settings_of({}))
    check(settings_of({**STAGE, "magic_prime": 101, "micro_bsz": 10, "devices": 2}))


PAIRS, CORPUS, PROMPTS = {"dpo_valid_file": "v.save"}, {"valid_data_file": "v"}, {"sample_prompts": "p.txt"}


@pytest.mark.parametrize(("flags", "words"), [
    ({"eval_every": 5}, "--eval_every 5 needs --dpo_valid_file, --valid_data_file or --sample_prompts"),
    ({"eval_pairs": 5, **CORPUS}, "--eval_pairs 5 needs --dpo_valid_file"),
    ({"eval_windows": 5, **PAIRS}, "--eval_windows 5 needs --valid_data_file"),
    ({"keep_best": "rewards/margins", **CORPUS}, "--keep_best rewards/margins needs --dpo_valid_file"),
    ({"keep_best": "corpus_loss", **PAIRS}, "--keep_best corpus_loss needs --valid_data_file"),
    ({"early_stop": 2, **PROMPTS}, "--early_stop 2 needs --dpo_valid_file or --valid_data_file"),
    ({"sample_tokens": 5, **PAIRS}, "--sample_tokens 5 needs --sample_prompts"),
])  # fmt: skip
def test_a_flag_of_evaluations_needs_something_to_evaluate(flags, words):
    with pytest.raises(InputError, match=words):
        check(settings_of(flags))


@pytest.mark.parametrize("flags", [
    {"eval_every": 5, **PROMPTS}, {"eval_every": 5, **CORPUS}, {"early_stop": 2, **CORPUS}, {"early_stop": 2, **PAIRS},
    {"keep_best": "corpus_loss", **CORPUS}, {"sample_temperature": 1.0, **PROMPTS},
])  # fmt: skip
def test_and_one_kind_is_enough(flags):
    check(settings_of(flags))
