"""Learning rate and weight decay by optimizer step: pure functions. Steps count from 0; the last step of a run has progress 1."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """lr goes from lr_init to lr_final between the end of the warm-up and the last step.

    Exponential; linear when either end is 0; cosine when `cosine_steps` is set (RWKV-LM's my_exit_tokens), and the mean of
    exponential and cosine with `blend_cosine` (a negative my_exit_tokens).
    """

    lr_init: float
    lr_final: float
    warmup_steps: int
    total_steps: int
    hold_steps: int = 0  # steps at lr_init before the decay begins (my_pile_edecay)
    cosine_steps: int = 0
    blend_cosine: bool = False
    weight_decay: float = 0.0
    weight_decay_final: float = -1.0


def _progress(step: int, start: int, total: int) -> float:
    """0 up to step `start`, 1 at the last of `total` steps."""
    return min(1.0, max(0.0, (step - start + 1) / max(total - start, 1)))


def lr_at(schedule: Schedule, step: int, steps_since_start: int) -> float:
    """Learning rate of optimizer step `step`; warm-up counts the steps since this process began, so that a continued run
    warms up again: from 0.2 of the rate to all of it."""
    s = schedule
    warmup = max(s.warmup_steps, 0)
    progress = _progress(step, warmup + s.hold_steps, s.total_steps)
    if s.lr_init == 0 or s.lr_final == 0:
        lr = s.lr_init + (s.lr_final - s.lr_init) * progress
    else:
        lr = s.lr_init * (s.lr_final / s.lr_init) ** progress
    if s.cosine_steps:
        wave = 0.5 + 0.5 * math.cos(math.pi * _progress(step, warmup, s.cosine_steps))
        cosine = s.lr_final + (s.lr_init - s.lr_final) * wave
        lr = (lr + cosine) / 2 if s.blend_cosine else cosine
    if steps_since_start < warmup:
        lr *= 0.2 + 0.8 * steps_since_start / warmup
    return lr


def weight_decay_at(schedule: Schedule, step: int) -> float:
    """Exponential from weight_decay to weight_decay_final when that is positive, else constant."""
    s = schedule
    if s.weight_decay <= 0 or s.weight_decay_final <= 0:
        return s.weight_decay
    total = s.cosine_steps or s.total_steps
    return s.weight_decay * (s.weight_decay_final / s.weight_decay) ** _progress(step, max(s.warmup_steps, 0), total)
