"""The identity of a run: the flags that decide its result, and the contents of the files that they name.

Every question "is this mine?" (a finished run, a checkpoint of last/, a run folder) is asked of an Identity.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rwkv_dpo.settings.fields import Part


@dataclass(frozen=True)
class Identity:
    """flags: all of them by name. content: for each flag that names a file, the sha256 of its contents, "" if the run reads nothing. parts:
    the part of each flag in the identity; not needed for an earlier run.

    A file that content lacks is known only by its path: in folders of earlier versions, and before the files are opened.
    """

    flags: Mapping[str, Any]
    content: Mapping[str, str]
    parts: Mapping[str, Part] = field(default_factory=dict)

    def changes_from(self, before: "Identity", free: Collection[Part], free_flags: Collection[str] = ()) -> list[str]:
        """What differs from before, except flags of the parts in `free`, each in a few words; files with the same name and different
        content first. A flag that did not exist in `before` is ignored."""
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
        """Paths of what the run reads."""
        return {Path(str(self.flags[name])).resolve() for name in self.content if self.flags.get(name)}

    def as_json(self) -> dict[str, Any]:
        """The flags, and in addition "content"."""
        return {**self.flags, "content": dict(self.content)}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "Identity":
        """The identity that as_json wrote, also in earlier versions, which had no "content"."""
        content = settings.get("content", {})
        return cls({name: value for name, value in settings.items() if name != "content"}, content if isinstance(content, dict) else {})
