"""Learning rates and decays against hand-derived values."""

import math

import pytest
from rwkv_dpo.schedule import Schedule, lr_at, weight_decay_at


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


def test_a_zero_end_makes_it_linear():
    s = Schedule(lr_init=1.0, lr_final=0.0, warmup_steps=-1, total_steps=4)
    assert [lr_at(s, step, step) for step in range(4)] == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_holding_delays_the_decay():
    s = Schedule(lr_init=1.0, lr_final=0.01, warmup_steps=0, total_steps=100, hold_steps=50)
    assert lr_at(s, 49, 49) == 1.0
    assert lr_at(s, 74, 74) == pytest.approx(0.1)


def test_exit_tokens_make_it_a_cosine():
    s = Schedule(lr_init=1.0, lr_final=0.2, warmup_steps=0, total_steps=1000, cosine_steps=100)
    assert lr_at(s, 49, 49) == pytest.approx(0.6)
    assert lr_at(s, 99, 99) == pytest.approx(0.2)
    blended = Schedule(lr_init=1.0, lr_final=0.2, warmup_steps=0, total_steps=100, cosine_steps=100, blend_cosine=True)
    assert lr_at(blended, 49, 49) == pytest.approx((0.6 + math.sqrt(0.2)) / 2)


def test_weight_decay_moves_only_with_a_final_value():
    assert weight_decay_at(Schedule(1, 1, 0, 100, weight_decay=0.1), 99) == 0.1
    moving = Schedule(1, 1, 0, 100, weight_decay=0.1, weight_decay_final=0.001)
    assert weight_decay_at(moving, 99) == pytest.approx(0.001)
    assert weight_decay_at(moving, 49) == pytest.approx(0.01)
