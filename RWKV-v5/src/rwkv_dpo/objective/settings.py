"""What a run minimises."""

import math
from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import NOT_NEGATIVE, SHARE, SWITCH, Accepts, flag

# The names of pair_losses.py and ranking_losses.py, and which of them take which options. What AOT's give a pair depends on the others.
AOT = ("aot", "aot_unpaired")
LOSSES_OF_PAIRS = (
    "sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "dpop", "simpo", "orpo", "sft", *AOT,
)  # fmt: skip
LOSSES_OF_RANKINGS = ("plackett_luce", "softmax", "all_pairs")
WITHOUT_REFERENCE = ("simpo", "orpo", "sft")
SMOOTHED = ("cdpo", "robust", "exo_pair", *AOT)
# Those whose values mean over tokens have no use for LD-DPO; rankings know an answer by one number, whichever it is compared with.
BY_SUMS = tuple(name for name in LOSSES_OF_PAIRS if name not in ("ipo", "sigmoid_norm", *WITHOUT_REFERENCE))
# Those that sort their pairs lose which weight is whose.
WEIGHTED = tuple(name for name in LOSSES_OF_PAIRS if name not in AOT)
DIVERGENT = ("sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop", *LOSSES_OF_RANKINGS)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _are_losses(text: str) -> bool:
    names = _names(text)
    return len(set(names)) == len(names) and set(names) <= {*LOSSES_OF_PAIRS, *LOSSES_OF_RANKINGS}


def _are_weights(text: str) -> bool:
    try:
        return not text or all(0 < float(weight) < math.inf for weight in _names(text))
    except ValueError:
        return False


@dataclass(frozen=True)
class ObjectiveSettings:
    """loss = ratio * language model + (1 - ratio) * DPO."""

    TITLE: ClassVar[str] = "objective"

    dpo: int = flag(1, "1: preference training; 0: plain language-model training", SWITCH)
    dpo_ref: str = flag(
        "file", "the reference model: file: that which scored the pair files; recompute: the model as training starts, which scores "
        "them before the first step", choices=("file", "recompute"),
    )  # fmt: skip
    dpo_sync_ref: int = flag(
        0, "N: with --dpo_ref recompute, move the reference towards the policy after every N optimizer steps, and score all pairs anew "
        "(TR-DPO); 0: it stays", NOT_NEGATIVE,
    )  # fmt: skip
    dpo_sync_alpha: float = flag(
        0.6, "how far: reference = alpha * policy + (1 - alpha) * reference",
        Accepts(lambda alpha: 0 < alpha <= 1, "above 0 and up to 1 is accepted"),
    )  # fmt: skip
    dpo_loss: str = flag(
        "sigmoid", "of preferences, several separated by commas: of pairs: sigmoid (DPO), " + ", ".join(LOSSES_OF_PAIRS[1:]) + "; of all "
        "answers to a prompt together: " + ", ".join(LOSSES_OF_RANKINGS),
        Accepts(_are_losses, f"accepted are {', '.join((*LOSSES_OF_PAIRS, *LOSSES_OF_RANKINGS))}, each once, separated by commas"),
    )  # fmt: skip
    dpo_loss_weights: str = flag(
        "", "of the losses of --dpo_loss in their sum, separated by commas; empty: 1 each",
        Accepts(_are_weights, "numbers above 0, separated by commas, are accepted"),
    )  # fmt: skip
    dpo_label_smoothing: float = flag(
        0.0, "how often a preference is taken to be wrong, for " + ", ".join(SMOOTHED),
        Accepts(lambda share: 0 <= share < 0.5, "from 0 up to but without 0.5 is accepted"),
    )  # fmt: skip
    dpo_f_divergence: str = flag(
        "reverse_kl", "what keeps the policy near the reference, for losses that compare two answers' log-ratios",
        choices=("reverse_kl", "forward_kl", "js", "alpha"),
    )  # fmt: skip
    dpo_f_alpha: float = flag(0.5, "alpha of --dpo_f_divergence alpha")
    dpo_ld_alpha: float = flag(
        1.0, "what the tokens count for by which an answer is longer than the other one, in policy and reference; 1: as much as others",
        SHARE,
    )  # fmt: skip
    dpo_wpo: int = flag(0, "1: weight each pair by how likely the policy itself is to write its answers (WPO)", SWITCH)
    simpo_gamma: float = flag(0.5, "margin of simpo", NOT_NEGATIVE)
    dpop_lambda: float = flag(50.0, "what dpop adds where a chosen answer becomes less likely than to the reference", NOT_NEGATIVE)
    dpo_beta: float = flag(0.01, "strength of the pull towards the reference model")
    dpo_general_corpus_ratio: float = flag(
        0.0, "r in loss = r * language model + (1 - r) * DPO; 0: pairs only, 1: corpus only", SHARE
    )

    @property
    def losses(self) -> tuple[str, ...]:
        """The names in dpo_loss."""
        return tuple(_names(self.dpo_loss))

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Those of the losses, where they are as many."""
        return tuple(map(float, _names(self.dpo_loss_weights))) if self.dpo_loss_weights else (1.0,) * len(self.losses)

    @property
    def uses_reference(self) -> bool:
        """Whether any of its preference losses does."""
        return not set(self.losses) <= set(WITHOUT_REFERENCE)

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
