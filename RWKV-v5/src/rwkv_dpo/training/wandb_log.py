"""--wandb: metrics for Weights & Biases, which may be unreachable or fail, and never ends a run."""

import datetime
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from rwkv_dpo.base.libraries import check_package
from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.training.metrics import MetricsLog
from rwkv_dpo.training.module import DPOModule
from rwkv_dpo.training.trackers import Tracker
from rwkv_dpo.training.validation import HeldOut

log = logging.getLogger(__name__)

# The run's id at Weights & Biases: a resumed run continues it.
ID_FILE = "wandb-run-id"
# For uploading the rest when a run ends; wandb by itself would wait forever.
_FINISH_S = "120"


def check_wandb(project: str) -> None:
    """Refuse --wandb if its package is missing. Raises InputError."""
    if project:
        check_package("wandb", f"--wandb {project}", "metrics.jsonl has the same figures")


class WandbLog(Tracker):
    """From rank 0. wandb's own settings (such as WANDB_MODE) are left to the user."""

    def __init__(self, project: str, flags: Mapping[str, Any], folder: Path, metrics: MetricsLog, held_out: HeldOut) -> None:
        super().__init__(metrics, held_out)
        self.project, self.flags, self.folder = project, flags, folder
        self.run: Any = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if trainer.is_global_zero:
            try:
                self.run = self._start(module)
            except Exception as error:
                _tell(error, "the run continues without it")

    @override
    def on_fit_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        self._do(lambda run: run.finish())
        self.run = None

    @override
    def on_exception(self, trainer: pl.Trainer, module: DPOModule, exception: BaseException) -> None:  # type: ignore[override]
        self.on_fit_end(trainer, module)

    @override
    def take(self, numbers: dict[str, float]) -> None:
        # A resumed run repeats some steps with the same values; wandb accepts steps in increasing order only.
        if self.run is not None and numbers["step"] >= self.run.step:
            self._do(lambda run: run.log(numbers, step=numbers["step"]))

    def _do(self, act: Callable[[Any], object]) -> None:
        if self.run is None:
            return
        try:
            act(self.run)
        except Exception as error:
            _tell(error, "the run continues without it")
            self.run = None

    def _start(self, module: DPOModule) -> Any:
        import wandb

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", _FINISH_S)
        mode = wandb.setup().settings.mode  # from the environment and `wandb offline`
        if mode == "disabled":
            return None
        shape = module.model.shape
        name = f"L{shape.n_layer} D{shape.n_embd} ctx{self.flags['ctx_len']} {datetime.datetime.now():%Y-%m-%d-%H-%M-%S}"
        settings: dict[str, Any] = {"project": self.project, "config": dict(self.flags), "dir": self.folder, "save_code": False}
        settings |= {} if "WANDB_NAME" in os.environ else {"name": name}
        settings |= {} if "WANDB_RUN_ID" in os.environ else {"id": self._run_id()}
        if mode not in ("offline", "dryrun"):
            try:
                if _has_account(wandb):
                    return wandb.init(resume="allow", **settings)
                log.warning("wandb: no account on this machine, logging offline; `wandb sync` uploads later")
            except Exception as error:
                _tell(error, "logging offline; `wandb sync` uploads later")
                wandb.teardown()  # it still holds the run that it could not start
        return wandb.init(mode="offline", **settings)

    def _run_id(self) -> str:
        path = self.folder / ID_FILE
        if not path.exists():
            with atomic_write(path) as file:
                file.write(f"{secrets.token_hex(4)}\n".encode())
        return path.read_text().strip()


def _has_account(wandb: Any) -> bool:
    """Without prompting for one, as wandb.init would do in a terminal."""
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # wandb before 0.31
        return wandb.api.api_key is not None


def _tell(error: Exception, what_now: str) -> None:
    lines = str(error).strip().splitlines()
    log.warning("wandb: %s; %s", lines[0] if lines else type(error).__name__, what_now)
