"""Where a run writes, what it keeps, and from what it goes on."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, NOT_NEGATIVE, SWITCH, Part, flag


@dataclass(frozen=True)
class FolderSettings:
    """The run folder and resumption."""

    TITLE: ClassVar[str] = "run folder and resumption"

    proj_dir: str = flag("out", "folder for checkpoints, logs and config.json", part=Part.INCIDENTAL)
    overwrite: int = flag(0, "1: use a proj_dir that holds a run with other settings", SWITCH, part=Part.INCIDENTAL)
    resume: str = flag(
        "auto", "auto: an interrupted run of proj_dir with these settings goes on; none: begin anew; else a file of last/",
        part=Part.INCIDENTAL,
    )  # fmt: skip
    epoch_save: int = flag(5, "save rwkv-{epoch}.pth every so many epochs; 0: only at the end", NOT_NEGATIVE)
    save_every: int = flag(
        0, "save all that a run needs to go on, into last/, every so many optimizer steps; 0: after every epoch", NOT_NEGATIVE,
        part=Part.INCIDENTAL,
    )  # fmt: skip
    keep: int = flag(2, "how many of those checkpoints stay", AT_LEAST_ONE, part=Part.INCIDENTAL)

    @property
    def path(self) -> Path:
        """Of the folder."""
        return Path(self.proj_dir)

    @property
    def last(self) -> Path:
        """Of the checkpoints that a run goes on from."""
        return self.path / "last"
