"""What a run minimises."""

from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import SHARE, SWITCH, flag


@dataclass(frozen=True)
class ObjectiveSettings:
    """loss = ratio * language model + (1 - ratio) * DPO."""

    TITLE: ClassVar[str] = "objective"

    dpo: int = flag(1, "1: preference training; 0: plain language-model training", SWITCH)
    dpo_ref: str = flag(
        "file", "the reference model: file: that which scored the pair files; recompute: the model as training starts, which scores "
        "them before the first step", choices=("file", "recompute"),
    )  # fmt: skip
    dpo_loss: str = flag(
        "sigmoid", "of preferences: sigmoid: DPO, pair by pair; of all answers to a prompt together: plackett_luce: the probability of "
        "their ranking; softmax: the best one against all others; all_pairs: sigmoid weighted by the difference of scores",
        choices=("sigmoid", "plackett_luce", "softmax", "all_pairs"),
    )  # fmt: skip
    dpo_beta: float = flag(0.01, "strength of the pull towards the reference model")
    dpo_general_corpus_ratio: float = flag(
        0.0, "r in loss = r * language model + (1 - r) * DPO; 0: pairs only, 1: corpus only", SHARE
    )

    @property
    def uses_corpus(self) -> bool:
        """Whether a language-model loss is part of it."""
        return not self.dpo or self.dpo_general_corpus_ratio > 0

    @property
    def uses_pairs(self) -> bool:
        """Whether DPO is part of it."""
        return bool(self.dpo) and self.dpo_general_corpus_ratio < 1

    @property
    def ratio(self) -> float:
        """Weight of the language-model loss."""
        return self.dpo_general_corpus_ratio if self.dpo else 1.0
