"""Learning rates and decays against hand-derived values."""

import math

import pytest
from rwkv_dpo.optimizer.schedule import Schedule, lr_at, weight_decay_at


def test_the_original_command_ends_at_lr_final():
    s = Schedule(lr_init=5e-6, lr_final=1e-6, warmup_steps=50, total_steps=400)
    assert lr_at(s, 399, 399) == pytest.approx(1e-6)
    assert lr_at(s, 50, 50) == pytest.approx(5e-6 * 0.2 ** (1 / 350))


def test_warm_up_rises_from_a_fifth():
    s = Schedule(lr_init=1.0, lr_final=1.0, warmup_steps=10, total_steps=100)
    assert [lr_at(s, step, step) for step in (0, 5, 10)] == pytest.approx([0.2, 0.6, 1.0])


def test_a_continued_run_warms_up_again():
    s = Schedule(lr_init=1.0, lr_final=1.0, warmup_steps=10, total_steps=100)
    assert lr_at(s, 60, 0) == pytest.approx(0.2)


def test_the_schedule_is_exponential_in_between():
    s = Schedule(lr_init=1.0, lr_final=0.01, warmup_steps=0, total_steps=100)
    assert lr_at(s, 49, 49) == pytest.approx(0.1)


def test_the_decay_begins_when_the_warm_up_is_over_and_ends_at_lr_final():
    s = Schedule(lr_init=1.0, lr_final=0.01, warmup_steps=10, total_steps=110)
    assert lr_at(s, 5, 5) == pytest.approx(0.6)  # of lr_init
    assert lr_at(s, 59, 59) == pytest.approx(0.1)
    assert lr_at(s, 109, 109) == lr_at(s, 500, 500) == pytest.approx(0.01)


def test_a_run_that_ends_within_its_warm_up_has_no_decay():
    s = Schedule(lr_init=1.0, lr_final=0.01, warmup_steps=10, total_steps=10)
    assert lr_at(s, 9, 9) == pytest.approx(0.2 + 0.8 * 0.9)
    assert lr_at(Schedule(lr_init=1.0, lr_final=0.01, warmup_steps=10, total_steps=11), 10, 10) == pytest.approx(0.01)


@pytest.mark.parametrize(("lr_init", "lr_final", "rates"), [(1.0, 0.0, [0.75, 0.5, 0.25, 0.0]), (0.0, 2.0, [0.5, 1.0, 1.5, 2.0])])
def test_a_zero_end_makes_it_linear(lr_init, lr_final, rates):
    s = Schedule(lr_init, lr_final, warmup_steps=-1, total_steps=4)
    assert [lr_at(s, step, step) for step in range(4)] == pytest.approx(rates)


def test_holding_delays_the_decay():
    s = Schedule(lr_init=1.0, lr_final=0.01, warmup_steps=0, total_steps=100, hold_steps=50)
    assert lr_at(s, 49, 49) == 1.0
    assert lr_at(s, 74, 74) == pytest.approx(0.1)
    warmed = Schedule(lr_init=1.0, lr_final=0.01, warmup_steps=10, total_steps=110, hold_steps=50)
    assert [lr_at(warmed, step, step) for step in (10, 59, 84)] == pytest.approx([1.0, 1.0, 0.1])


def test_exit_tokens_make_it_a_cosine():
    s = Schedule(lr_init=1.0, lr_final=0.2, warmup_steps=0, total_steps=1000, cosine_steps=100)
    assert lr_at(s, 49, 49) == pytest.approx(0.6)
    assert lr_at(s, 99, 99) == pytest.approx(0.2)
    blended = Schedule(lr_init=1.0, lr_final=0.2, warmup_steps=0, total_steps=100, cosine_steps=100, blend_cosine=True)
    assert lr_at(blended, 49, 49) == pytest.approx((0.6 + math.sqrt(0.2)) / 2)
    warmed = Schedule(lr_init=1.0, lr_final=0.2, warmup_steps=20, total_steps=1000, cosine_steps=120)
    assert lr_at(warmed, 10, 10) == pytest.approx(0.6)  # 0.2 + 0.8 / 2 of lr_init
    assert lr_at(warmed, 69, 69) == pytest.approx(0.6)


def test_weight_decay_moves_only_with_a_final_value():
    assert weight_decay_at(Schedule(1, 1, 0, 100, weight_decay=0.1), 99) == 0.1
    moving = Schedule(1, 1, -1, 100, weight_decay=0.1, weight_decay_final=0.001)
    assert weight_decay_at(moving, 99) == pytest.approx(0.001)
    assert weight_decay_at(moving, 49) == pytest.approx(0.01)
    assert weight_decay_at(Schedule(1, 1, 0, 100, weight_decay=0.1, weight_decay_final=0.0), 99) == 0.1
    assert weight_decay_at(Schedule(1, 1, 0, 100, weight_decay=0.0, weight_decay_final=0.1), 99) == 0.0


def test_weight_decay_begins_after_the_warm_up_and_ends_where_exit_tokens_end_the_run():
    """Half of the way from 0.1 to 0.001 is 0.01: after 45 of the 90 steps that follow the warm-up."""
    warmed = Schedule(1, 1, warmup_steps=10, total_steps=100, weight_decay=0.1, weight_decay_final=0.001)
    assert [weight_decay_at(warmed, step) for step in (0, 9, 54, 99)] == pytest.approx([0.1, 0.1, 0.01, 0.001])
    shorter = Schedule(1, 1, warmup_steps=10, total_steps=1000, cosine_steps=100, weight_decay=0.1, weight_decay_final=0.001)
    assert [weight_decay_at(shorter, step) for step in (0, 9, 54, 99)] == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_a_schedule_of_four_numbers_holds_nothing_and_decays_no_weights():
    """The rate falls from the end of the warm-up on: after one of 4 steps from 1 to 0.0001 it is 0.1."""
    s = Schedule(lr_init=1.0, lr_final=1e-4, warmup_steps=0, total_steps=4)
    assert [lr_at(s, step, step) for step in range(4)] == pytest.approx([1e-1, 1e-2, 1e-3, 1e-4])
    assert [weight_decay_at(s, step) for step in range(4)] == [0.0] * 4
