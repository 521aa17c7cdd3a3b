"""Where a run writes, and what it continues from."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rwkv_dpo.settings.fields import SWITCH, Part, flag


@dataclass(frozen=True)
class FolderSettings:
    """The run folder and resumption."""

    TITLE: ClassVar[str] = "run folder and resumption"

    proj_dir: str = flag("out", "folder for checkpoints, logs and config.json", part=Part.INCIDENTAL)
    overwrite: int = flag(0, "1: use a proj_dir that holds a run with other settings", SWITCH, part=Part.INCIDENTAL)
    resume: str = flag(
        "auto", "auto: continue an interrupted run in proj_dir that has these settings; none: start a fresh run; else a file in last/",
        part=Part.INCIDENTAL,
    )  # fmt: skip

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.proj_dir)
