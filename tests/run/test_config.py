"""Derived numbers of a run: steps, epochs, ends."""

from rwkv_dpo.objective.settings import ObjectiveSettings
from rwkv_dpo.run.settings import settings_of

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
