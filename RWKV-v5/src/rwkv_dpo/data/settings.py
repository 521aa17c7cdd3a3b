"""What a run reads."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import AT_LEAST_ONE, flag

_TYPES = ("utf-8", "utf-16le", "numpy", "binidx", "dummy", "uint16")


@dataclass(frozen=True)
class DataSettings:
    """Corpus and pair files."""

    TITLE: ClassVar[str] = "data"

    data_file: str = flag(
        "", "corpus of tokens or text; not needed with --dpo 1 --dpo_general_corpus_ratio 0", names_file=True
    )
    data_type: str = flag(
        "utf-8", "format of data_file; if not given, it is detected from the file",
        choices=_TYPES,
    )  # fmt: skip
    ctx_len: int = flag(1024, "tokens per corpus window", AT_LEAST_ONE)
    dpo_train_file: str = flag("trainset.save", "preference pairs to train on", names_file=True)
    dpo_valid_file: str = flag("", "preference pairs to evaluate at the end of every epoch; empty: none", names_file=True)
    valid_data_file: str = flag("", "held-out corpus to evaluate at the same times; empty: none", names_file=True)
    valid_data_type: str = flag(
        "", "format of valid_data_file, as for data_type; empty: detected from the file", choices=("", *_TYPES)
    )
