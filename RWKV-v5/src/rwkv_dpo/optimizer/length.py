"""How long a run is, in epochs, micro-batches and optimizer steps, and what its learning rate is at its end."""

from dataclasses import dataclass

from rwkv_dpo.optimizer.schedule import Schedule, lr_at
from rwkv_dpo.optimizer.settings import EpochSettings, OptimizerSettings


@dataclass(frozen=True)
class RunLength:
    """epoch_begin, end: the first epoch, and the one before which the run stops. epoch_steps: micro-batches in an epoch.
    accumulated: micro-batches in an optimizer step. samples: corpus windows, and pairs, of a micro-batch on all devices together.
    exit_steps: optimizer steps that cover --my_exit_tokens, 0 without. first_step: the schedule's step at which the run begins.
    total_steps: optimizer steps that it takes.
    """

    epoch_begin: int
    end: int
    epoch_steps: int
    accumulated: int
    samples: int
    exit_steps: int
    first_step: int
    total_steps: int

    @property
    def n_epochs(self) -> int:
        """Epochs that the run takes."""
        return self.end - self.epoch_begin

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.epoch_steps // self.accumulated


def run_length(epochs: EpochSettings, samples: int, ctx_len: int, is_staged: bool) -> RunLength:
    """samples, ctx_len: windows in a micro-batch on all devices, and tokens in one. is_staged: the run is stage 2 or 3 of RWKV-LM's staged
    pre-training, which counts epoch_count, and the schedule's steps, from epoch 0."""
    e = epochs
    end = e.epoch_count if is_staged else e.epoch_begin + e.epoch_count
    end = max(min(end, e.my_exit + 1), e.epoch_begin)
    per_epoch = e.epoch_steps // e.accumulate_grad_batches
    exit_steps = -(-abs(e.my_exit_tokens) // (ctx_len * samples * e.accumulate_grad_batches))
    first_step = e.epoch_begin * per_epoch if is_staged else 0
    total_steps = (end - e.epoch_begin) * per_epoch
    if e.my_exit_tokens:
        total_steps = min(total_steps, max(exit_steps - first_step, 0))
    return RunLength(
        e.epoch_begin, end, e.epoch_steps, e.accumulate_grad_batches, samples, exit_steps, first_step, total_steps
    )


def schedule_of(optimizer: OptimizerSettings, epochs: EpochSettings, length: RunLength) -> Schedule:
    """The learning rate and the weight decay of a run, by optimizer step."""
    return Schedule(
        lr_init=optimizer.lr_init,
        lr_final=optimizer.lr_final,
        warmup_steps=optimizer.warmup_steps,
        total_steps=length.first_step + length.n_epochs * length.steps_per_epoch,
        hold_steps=epochs.my_pile_edecay * length.steps_per_epoch,
        cosine_steps=length.exit_steps,
        blend_cosine=epochs.my_exit_tokens < 0,
        weight_decay=optimizer.weight_decay,
        weight_decay_final=optimizer.weight_decay_final,
    )


def far_end(epochs: EpochSettings, length: RunLength, schedule: Schedule) -> str:
    """Why the run's last learning rate is not lr_final; "" when it is, to a hundredth of the way from lr_init."""
    s, n_steps = schedule, length.total_steps
    last = lr_at(s, length.first_step + n_steps - 1, n_steps - 1)
    if abs(last - s.lr_final) <= 0.01 * max(abs(s.lr_init - s.lr_final), s.lr_final):
        return ""
    held = max(s.warmup_steps, 0) + s.hold_steps
    if s.warmup_steps >= n_steps:
        reason = f"--warmup_steps {s.warmup_steps}: the run has {n_steps}"
    elif held >= s.total_steps and not length.exit_steps:
        reason = f"--my_pile_edecay {epochs.my_pile_edecay} and the warm-up keep it at --lr_init until step {held}"
    elif length.exit_steps > length.first_step + n_steps:
        reason = f"--my_exit_tokens {epochs.my_exit_tokens} takes {length.exit_steps} steps, and the epochs end before"
    else:
        reason = f"--my_exit_tokens {epochs.my_exit_tokens} ends the run before its epochs do"
    return f"the last of {n_steps} optimizer steps has a learning rate of {last:.3g} instead of --lr_final {s.lr_final:g} ({reason})"
