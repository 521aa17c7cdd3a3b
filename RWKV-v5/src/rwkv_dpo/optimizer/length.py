"""How long a run is: whether it trains at all, and what its learning rate is at its end."""

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.optimizer.schedule import lr_at
from rwkv_dpo.run.config import RunConfig


def check_trains(c: RunConfig) -> None:
    """Refuses a run of no steps. With staged pre-training they are known once its folder has been looked at."""
    if c.total_steps:
        return
    if c.my_exit < c.epoch_begin:
        refuse(f"--my_exit {c.my_exit}: nothing would be trained, since the run begins with epoch {c.epoch_begin}")
    if c.last_epoch == c.epoch_begin:
        refuse(f"--my_pile_stage {c.my_pile_stage}: {c.proj_dir} holds the last of its {c.epoch_count} epochs; nothing is left to train")
    refuse(
        f"--my_exit_tokens {c.my_exit_tokens}: nothing would be trained, since the epochs before {c.epoch_begin} have taken "
        f"{c.first_step} optimizer steps, and these tokens {c.exit_steps}"
    )


def far_end(c: RunConfig) -> str:
    """Why the run's last learning rate is not lr_final; "" when it is, to a hundredth of the way from lr_init."""
    s = c.schedule
    last = lr_at(s, c.first_step + c.total_steps - 1, c.total_steps - 1)
    if abs(last - c.lr_final) <= 0.01 * max(abs(c.lr_init - c.lr_final), c.lr_final):
        return ""
    held = max(s.warmup_steps, 0) + s.hold_steps
    if s.warmup_steps >= c.total_steps:
        reason = f"--warmup_steps {s.warmup_steps}: the run has {c.total_steps}"
    elif held >= s.total_steps and not c.exit_steps:
        reason = f"--my_pile_edecay {c.my_pile_edecay} and the warm-up keep it at --lr_init until step {held}"
    elif c.exit_steps > c.first_step + c.total_steps:
        reason = f"--my_exit_tokens {c.my_exit_tokens} takes {c.exit_steps} steps, and the epochs end before"
    else:
        reason = f"--my_exit_tokens {c.my_exit_tokens} ends the run before its epochs do"
    return f"the last of {c.total_steps} optimizer steps has a learning rate of {last:.3g} instead of --lr_final {c.lr_final:g} ({reason})"
