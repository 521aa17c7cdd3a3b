"""report.html and curves.png in the run folder: what its files contain, updated at every evaluation."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from rwkv_dpo.files.atomic import atomic_write
from rwkv_dpo.report.columns import Columns
from rwkv_dpo.report.curves import charts
from rwkv_dpo.report.drawing import as_png
from rwkv_dpo.report.run_doubts import run_doubts
from rwkv_dpo.report.run_page import About, as_run_page
from rwkv_dpo.training.halt import Halted
from rwkv_dpo.training.module import DPOModule
from rwkv_dpo.training.validation import AfterEvaluation, HeldOut

log = logging.getLogger(__name__)

REPORT, CURVES = "report.html", "curves.png"
# A picture takes matplotlib half a second or more: short epochs don't each get one.
_PICTURE_PAUSE_S = 60.0


class Lines:
    """The JSON lines of a growing log: each is read once."""

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """The lines completed since the last call; what is not a JSON object is ignored. Raises OSError."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.place)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.place += len(line)
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(record, dict):
                    yield record


class RunFiles:
    """The contents of a run folder's logs, including those before a resumption."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.train, self.held_out = folder, Columns(), Columns()
        self.samples: dict[str, Any] = {}  # those of the last evaluation
        self.logs = {name: Lines(folder / f"{name}.jsonl") for name in ("metrics", "valid", "samples")}

    def read(self) -> None:
        """Read what is new. Raises OSError."""
        for name, columns in (("metrics", self.train), ("valid", self.held_out)):
            for record in self.logs[name].new():
                columns.add(record)
        for record in self.logs["samples"].new():
            self.samples = record

    def about(self, about: About, warnings: Mapping[str, str], state: str) -> About:
        """The description, with what the folder contains apart from the curves."""
        samples = self.samples.get("samples")
        step = self.samples.get("step")
        return about._replace(
            warnings=list(warnings.values()), state=state, samples_step=step if isinstance(step, int) else 0,
            samples=[one for one in samples if isinstance(one, dict) and "prompt" in one] if isinstance(samples, list) else [],
        )  # fmt: skip


class RunReport(AfterEvaluation):
    """Writes both on rank 0: the page at every evaluation; page and picture at the end of epochs and of the run. Warns once of each known
    failure mode that appears. A failure to write is reported once and doesn't end the run. Comes after the callbacks that write the
    logs."""

    def __init__(self, folder: Path, about: About, held_out: HeldOut) -> None:
        """about: the description, without what the folder contains."""
        super().__init__(held_out)
        self.files, self.about = RunFiles(folder), about
        self.told: set[str] = set()
        self.drawn_at = -float("inf")

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        self.seen = self.held_out.record
        self._write(trainer, "running", draws=False)

    @override
    def on_evaluation(self, trainer: pl.Trainer, module: DPOModule, record: dict[str, Any]) -> None:
        self._write(trainer, "running", draws=False)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        self.seen = self.held_out.record
        self._write(trainer, "running", draws=time.monotonic() - self.drawn_at > _PICTURE_PAUSE_S)

    @override
    def on_train_end(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        self._write(trainer, "finished", draws=True)

    @override
    def on_exception(self, trainer: pl.Trainer, module: DPOModule, exception: BaseException) -> None:  # type: ignore[override]
        if isinstance(exception, Halted):
            if exception.fault:
                self.told.add("file")  # the run's last line reports what can't be written
            self._write(trainer, str(exception), draws=False)

    def _write(self, trainer: pl.Trainer, state: str, draws: bool) -> None:
        if not trainer.is_global_zero:
            return
        files = self.files
        try:
            files.read()
            doubts = run_doubts(files.train, files.held_out, self.about.flags)
            self._warn(doubts)
            about = files.about(self.about, doubts, f"{state}; written {time.strftime('%Y-%m-%d %H:%M')}")
            _write(files.folder / REPORT, as_run_page(about, files.train, files.held_out).encode(errors="replace"))
            if draws:
                self.drawn_at = time.monotonic()
                _write(files.folder / CURVES, as_png(self.about.title, charts(files.train, files.held_out)))
        except ModuleNotFoundError as error:
            self._warn({"picture": f"{CURVES} is not drawn: the package {str(error.name).partition('.')[0]} is missing"})
        except Exception as error:  # hours of training are worth more than a page
            self._warn({"file": f"{str(error) or type(error).__name__}; the run continues without {REPORT}"})

    def _warn(self, lines: Mapping[str, str]) -> None:
        for name, line in lines.items():
            if name not in self.told:
                self.told.add(name)
                log.warning("%s", line)


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
