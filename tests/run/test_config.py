"""Derived numbers of a run: steps, epochs, ends."""

import pytest
from rwkv_dpo.objective.settings import ObjectiveSettings
from rwkv_dpo.run.settings import FLAGS, PARTS, ROOMS, settings_of
from rwkv_dpo.settings.fields import Part, flags_of

README_RUN = settings_of({"epoch_steps": 2000, "epoch_count": 4, "accumulate_grad_batches": 20, "micro_bsz": 1, "ctx_len": 4096})


def test_the_original_command_takes_400_optimizer_steps():
    assert README_RUN.length.steps_per_epoch == 100
    assert README_RUN.length.total_steps == 400
    assert README_RUN.schedule.total_steps == 400


def test_a_continued_run_has_its_own_epochs_and_schedule():
    c = README_RUN.with_flags(epoch_begin=4)
    assert (c.length.end, c.length.first_step, c.length.total_steps) == (8, 0, 400)


def test_staged_pretraining_counts_from_epoch_0():
    c = README_RUN.with_flags(my_pile_stage=3, magic_prime=1, epoch_begin=3)
    assert (c.length.end, c.length.first_step, c.length.total_steps, c.schedule.total_steps) == (4, 300, 100, 400)


def test_exit_tokens_end_the_run_and_set_the_cosine():
    c = README_RUN.with_flags(my_exit_tokens=4096 * 20 * 30 - 5)
    assert c.length.exit_steps == c.length.total_steps == c.schedule.cosine_steps == 30
    assert not c.schedule.blend_cosine
    # Ranks share the tokens of a step; epochs may end the run before the tokens do; a negative number has a mean of two curves.
    c = README_RUN.with_flags(my_exit_tokens=-4096 * 20 * 8 * 500, devices=4, num_nodes=2)
    assert (c.length.exit_steps, c.length.total_steps) == (500, 400)
    assert c.schedule.blend_cosine


def test_exit_tokens_count_from_epoch_0_in_staged_pretraining():
    c = README_RUN.with_flags(my_pile_stage=3, magic_prime=1, epoch_begin=2, my_exit_tokens=4096 * 20 * 230)
    assert (c.length.first_step, c.length.exit_steps, c.length.total_steps) == (200, 230, 30)
    assert c.with_flags(epoch_begin=3).length.total_steps == 0


def test_holding_counts_epochs():
    assert README_RUN.with_flags(my_pile_edecay=2).schedule.hold_steps == 200


def test_my_exit_is_the_last_epoch():
    assert README_RUN.with_flags(my_exit=1).length.end == 2


def test_the_ratio_decides_what_is_needed():
    needs = [ObjectiveSettings(dpo_general_corpus_ratio=r) for r in (0.0, 0.5, 1.0)]
    assert [(c.uses_corpus, c.uses_pairs) for c in needs] == [(False, True), (True, True), (True, False)]
    plain = ObjectiveSettings(dpo=0)
    assert (plain.uses_corpus, plain.uses_pairs, plain.ratio) == (True, False, 1.0)


def test_what_a_flag_is_to_a_runs_identity():
    """A flag that is named nowhere here decides the result: a run with another value of it is another run."""
    parts = {
        Part.INCIDENTAL: {
            "proj_dir", "overwrite", "wandb", "enable_progress_bar", "cpu_malloc", "wkv_backend", "accelerator", "resume", "save_every",
            "keep", "max_bad_steps", "any_base", "gpu_ids", "eval_every", "eval_pairs", "keep_best",
            "eval_windows", "early_stop", "recipe", "epochs", "sample_prompts", "sample_tokens", "sample_temperature", "sample_top_p",
            "tensorboard", "log_every_s",
        },
        Part.CONTINUATION: {"load_model", "epoch_begin", "epoch_count", "my_pile_stage", "my_exit", "warmup_steps", "peft_load"},
        Part.LAYOUT: {
            "devices", "num_nodes", "strategy", "ds_bucket_mb", "grad_cp", "chunk_ctx", "micro_bsz", "accumulate_grad_batches",
            "epoch_steps", "batch_tokens",
        },
    }  # fmt: skip
    expected = {name: part for part, names in parts.items() for name in names}
    assert {name: expected.get(name, Part.RESULT) for name in FLAGS} == PARTS


def test_a_flag_stands_in_one_room():
    names = [name for room in ROOMS.values() for name in flags_of(room)]
    assert len(names) == len(set(names)) == len(FLAGS)
    with pytest.raises(AssertionError, match="no such flags: lr_inti"):
        settings_of({"lr_inti": 1.0})
