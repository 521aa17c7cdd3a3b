"""What makes a run the run it is: the flags that decide its result, and what is in the files that they name.

Every question "is this mine?" (a finished run, a checkpoint of last/, a run folder) is asked of an Identity.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rwkv_dpo.base.errors import reading
from rwkv_dpo.data.corpus import Corpus, corpus_sha256
from rwkv_dpo.data.pairs import PairSet, content_sha256
from rwkv_dpo.files.hashed import file_sha256
from rwkv_dpo.run.config import RunConfig

# Flags that name what a run reads. Their content counts, not their path.
FILES = ("load_model", "peft_load", "data_file", "dpo_train_file", "dpo_valid_file")


@dataclass(frozen=True)
class Identity:
    """flags: all of them by name. content: by each of FILES, the sha256 of what it names, "" where the run reads nothing.

    A file that content lacks is known by its path alone: in folders of earlier versions, and before the files are opened.
    """

    flags: Mapping[str, Any]
    content: Mapping[str, str]

    def changes_from(self, before: "Identity", free: Collection[str]) -> list[str]:
        """What is another than before, but for the flags in `free`, each in a few words. A flag that is newer than `before` is none."""
        changes = []
        for name, was in before.flags.items():
            now = self.flags.get(name)
            is_known = name in before.content and name in self.content
            is_same = before.content[name] == self.content[name] if is_known else now == was
            if name not in free and not is_same:
                changes.append(f"--{name} {now} ({f'was {was}' if now != was else 'its content has changed'})")
        return changes

    def as_json(self) -> dict[str, Any]:
        """The flags, and beside them "content"."""
        return {**self.flags, "content": dict(self.content)}

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> "Identity":
        content = settings.get("content", {})
        return cls({name: value for name, value in settings.items() if name != "content"}, content if isinstance(content, dict) else {})


def flags_of(config: RunConfig) -> Identity:
    """Known by flags and paths alone."""
    return Identity(asdict(config), {})


def identity_of(config: RunConfig, corpus: Corpus | None, pairs: PairSet | None, valid: PairSet | None) -> Identity:
    """Reads the checkpoint once, and of a large corpus a sample."""
    c = config
    content = {
        "load_model": _path_sha256(c.load_model) if c.load_model and c.my_pile_stage != 1 else "",
        "peft_load": _path_sha256(c.peft_load) if c.peft_load else "",
        "data_file": corpus_sha256(corpus) if corpus else "",
        "dpo_train_file": content_sha256(pairs, c.dpo_ref == "file") if pairs is not None else "",
        "dpo_valid_file": content_sha256(valid, c.dpo_ref == "file") if valid is not None else "",
        # Beside what is in the files: by these evaluate.py knows which pairs were held out from the run.
        **{name: str(pairs.header.get(name, "")) if pairs is not None else "" for name in ("source_id", "preparation_id")},
    }
    return Identity(asdict(c), content)


def _path_sha256(path: str) -> str:
    """Of a file, or of the files in an adapter folder; "" of what isn't there, which its reader refuses."""
    if not Path(path).exists():
        return ""
    with reading(path):
        if not Path(path).is_dir():
            return file_sha256(path)
        digest = hashlib.sha256()
        for file in sorted(one for one in Path(path).iterdir() if one.is_file() and one.suffix in (".json", ".safetensors")):
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
        return digest.hexdigest()
