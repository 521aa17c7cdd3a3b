"""What makes a run the run it is: the flags that decide its result, and what is in the files that they name.

Every question "is this mine?" (a finished run, a checkpoint of last/, a run folder) is asked of an Identity.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_dpo.settings.fields import Part


@dataclass(frozen=True)
class Identity:
    """flags: all of them by name. content: by each flag that names a file, the sha256 of what is in it, "" where the run reads nothing.
    parts: what each flag is to the identity; not needed of an earlier run.

    A file that content lacks is known by its path alone: in folders of earlier versions, and before the files are opened.
    """

    flags: Mapping[str, Any]
    content: Mapping[str, str]
    parts: Mapping[str, Part] = field(default_factory=dict)

    def changes_from(self, before: "Identity", free: Collection[Part], free_flags: Collection[str] = ()) -> list[str]:
        """What is another than before, but for the flags of the parts in `free`, each in a few words; files of the same name and another
        content first. A flag that is newer than `before` is none."""
        changes, contents = [], []
        for name, was in before.flags.items():
            now = self.flags.get(name)
            is_known = name in before.content and name in self.content
            is_same = before.content[name] == self.content[name] if is_known else now == was
            if is_same or name in free_flags or self.parts.get(name) in free:
                continue
            if now == was:
                contents.append(f"--{name} {now} (its content has changed)")
            else:
                changes.append(f"--{name} {now} (was {was})")
        return contents + changes

    @property
    def paths(self) -> set[Path]:
        """Of what the run reads."""
        return {Path(str(self.flags[name])).resolve() for name in self.content if self.flags.get(name)}

    def as_json(self) -> dict[str, Any]:
        """The flags, and beside them "content"."""
        return {**self.flags, "content": dict(self.content)}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "Identity":
        """The identity that as_json wrote, also as earlier versions did, without "content"."""
        content = settings.get("content", {})
        return cls({name: value for name, value in settings.items() if name != "content"}, content if isinstance(content, dict) else {})
