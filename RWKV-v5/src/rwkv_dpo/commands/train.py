"""Train an RWKV model on a corpus, on preference pairs, or on both."""

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from rwkv_dpo.base.script import run_script
from rwkv_dpo.files.hub import local_file
from rwkv_dpo.run.flags import build_parser as build_parser  # every command has one
from rwkv_dpo.run.flags import parse_flags


def main(arguments: Sequence[str]) -> None:
    """Runs the command. Raises InputError."""
    config, given = parse_flags(arguments)
    # A dry run can do without the checkpoint.
    config = config.with_flags(load_model=local_file("--load_model", config.model.load_model, downloads=not config.general.dry_run))
    from rwkv_dpo.run.trainer import train  # torch and Lightning take seconds; --help and typing errors don't wait

    keep_quiet()
    train(config, given)


def keep_quiet() -> None:
    """Show our own lines, from one rank only, and of other packages only warnings that a user can act on. To be called after Lightning's
    import, which sets its own levels and knows the rank."""
    from pytorch_lightning.utilities import rank_zero_only

    rank = rank_zero_only.rank  # type: ignore[attr-defined]  # Lightning sets it when it is imported
    logging.basicConfig(level=logging.WARNING if rank else logging.INFO, format="%(message)s")
    for name in ("pytorch_lightning", "lightning_fabric", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*", ".*handles gradient clipping internally.*", ".*is deprecated.*",
        ".*dataloader is not resumable.*",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message)


def leave(status: int) -> NoReturn:
    """End the process; if it belonged to a group, without finalizing Python. gloo's threads may still hold tensors of the last
    exchange, even after the group is destroyed. Releasing one while the interpreter is being finalized aborts the process, so that a
    finished run would end as a failed one (pytorch/pytorch#179291)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_first_process() -> bool:
    """According to the environment that torchrun, Lightning or Slurm give a process, before anything is imported that knows the rank."""
    return next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0") == "0"


def run(arguments: Sequence[str]) -> NoReturn:
    """Runs the command, and ends the process with its status."""
    # Once steps have begun, a signal doesn't end the run here: the step is finished and saved first (training/halt.py).
    stopped = "no step was finished and nothing was saved; the same command starts again"
    run_script(lambda: main(arguments), leave, stopped, is_first_process())
