"""Runs that would do nothing, and runs whose learning rate doesn't end where it should."""

import re

import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.optimizer.length import far_end
from rwkv_dpo.run.flags import parse_flags
from rwkv_dpo.run.rules import check_trains
from rwkv_dpo.run.settings import settings_of

# 400 optimizer steps in 4 epochs.
README_RUN = settings_of({"epoch_steps": 2000, "epoch_count": 4, "accumulate_grad_batches": 20, "micro_bsz": 1, "ctx_len": 4096})


@pytest.mark.parametrize(("changes", "message"), [
    ({"my_exit": -1}, "--my_exit -1: nothing would be trained, because the run begins with epoch 0"),
    ({"epoch_begin": 7, "my_exit": 3}, "--my_exit 3: nothing would be trained, because the run begins with epoch 7"),
    ({"my_pile_shift": -2}, r"--my_pile_shift -2: -1 \(none\), and 0 or more"),
    ({"my_pile_shift": 5}, "--my_pile_shift 5 shifts the windows of --magic_prime, which is not given"),
])  # fmt: skip
def test_a_run_that_would_do_nothing_is_refused(changes, message):
    settings = {"data_file": "x", "epoch_steps": 2000, "accumulate_grad_batches": 20}
    with pytest.raises(InputError, match=message):
        parse_flags([part for name, value in (settings | changes).items() for part in (f"--{name}", str(value))])
    assert parse_flags(["--my_exit", "0"])[0].length.total_steps == 1000


def test_a_stage_without_steps_is_refused():
    stage = README_RUN.with_flags(my_pile_stage=3, magic_prime=80963, epoch_count=2, epoch_begin=2)
    with pytest.raises(InputError, match="--my_pile_stage 3: out already holds the last of its 2 epochs; nothing is left to train"):
        check_trains(stage)
    # An epoch of 100 steps, each of 20 windows of 4,096 tokens.
    exits = stage.with_flags(epoch_begin=1, my_exit_tokens=100 * 20 * 4096)
    with pytest.raises(InputError, match=r"--my_exit_tokens 8192000: nothing would be trained: .* before 1 took 100 .* tokens allow 100"):
        check_trains(exits)
    check_trains(exits.with_flags(my_exit_tokens=100 * 20 * 4096 + 1))


@pytest.mark.parametrize(("changes", "message"), [
    ({}, ""), ({"warmup_steps": 50}, ""), ({"warmup_steps": 399}, ""), ({"lr_final": 0.0}, ""), ({"lr_final": 6e-4}, ""),
    ({"my_exit": 1}, ""), ({"epoch_begin": 4}, ""), ({"my_pile_edecay": 3}, ""), ({"my_exit_tokens": 4096 * 20 * 30}, ""),
    # Half of the way up from a fifth: 6e-4 * (0.2 + 0.8 * 399 / 800).
    ({"warmup_steps": 800}, r"the last of 400 optimizer steps has a learning rate of 0.000359 instead of --lr_final 1e-05 "
                            r"\(--warmup_steps 800: the run has 400\)"),
    # Three eighths of the way.
    ({"epoch_steps": 20, "warmup_steps": 8}, r"last of 4 optimizer steps has a learning rate of 0.0003 "),
    ({"warmup_steps": 30, "my_exit_tokens": 4096 * 20 * 30}, r"last of 30 .*\(--warmup_steps 30: the run has 30\)"),
    ({"my_pile_edecay": 4}, r"learning rate of 0.0006 .*\(--my_pile_edecay 4 and the warm-up keep it at --lr_init until step 400"),
    # Half of a cosine.
    ({"my_exit_tokens": 4096 * 20 * 800}, r"learning rate of 0.000305 .*takes 800 steps, and the epochs end before"),
    ({"my_exit_tokens": -4096 * 20 * 30}, r"last of 30 .*--my_exit_tokens -2457600 ends the run before its epochs do"),
])  # fmt: skip
def test_a_run_that_ends_far_from_its_last_rate_is_told_why(changes, message):
    settings = README_RUN.with_flags(**changes)
    told = far_end(settings.epochs, settings.length, settings.schedule)
    assert (re.search(message, told) if message else told == ""), told
