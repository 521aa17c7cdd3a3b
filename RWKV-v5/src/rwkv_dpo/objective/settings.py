"""What a run minimizes."""

import math
from dataclasses import dataclass
from typing import ClassVar

from rwkv_dpo.settings.fields import NOT_NEGATIVE, SHARE, SWITCH, Accepts, flag

# The names in pair_losses.py and ranking_losses.py, and which of them take which options. AOT's value of a pair depends on the other pairs.
AOT = ("aot", "aot_unpaired")
LOSSES_OF_PAIRS = (
    "sigmoid", "cdpo", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop", "dpop", "simpo", "orpo", "sft", *AOT,
)  # fmt: skip
LOSSES_OF_RANKINGS = ("plackett_luce", "softmax", "all_pairs")
WITHOUT_REFERENCE = ("simpo", "orpo", "sft")
SMOOTHED = ("cdpo", "robust", "exo_pair", *AOT)
# LD-DPO is of no use to losses that average over tokens. Rankings have one value per answer, whichever answer it is compared with.
BY_SUMS = tuple(name for name in LOSSES_OF_PAIRS if name not in ("ipo", "sigmoid_norm", *WITHOUT_REFERENCE))
# Losses that sort their pairs lose track of which weight belongs to which pair.
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
        "file", "the reference model: file: the one that scored the pair files; recompute: the model that training starts from, which "
        "scores them before the first step", choices=("file", "recompute"),
    )  # fmt: skip
    dpo_sync_ref: int = flag(
        0, "N: with --dpo_ref recompute, move the reference towards the policy after every N optimizer steps, and score all pairs again "
        "(TR-DPO); 0: the reference is fixed", NOT_NEGATIVE,
    )  # fmt: skip
    dpo_sync_alpha: float = flag(
        0.6, "how far the reference moves: reference = alpha * policy + (1 - alpha) * reference",
        Accepts(lambda alpha: 0 < alpha <= 1, "above 0 and up to 1 is accepted"),
    )  # fmt: skip
    dpo_loss: str = flag(
        "sigmoid", "preference loss, or several separated by commas; of pairs: sigmoid (DPO), " + ", ".join(LOSSES_OF_PAIRS[1:]) + "; of "
        "all answers to a prompt: " + ", ".join(LOSSES_OF_RANKINGS),
        Accepts(_are_losses, f"accepted are {', '.join((*LOSSES_OF_PAIRS, *LOSSES_OF_RANKINGS))}, each once, separated by commas"),
    )  # fmt: skip
    dpo_loss_weights: str = flag(
        "", "weights of the losses of --dpo_loss in their sum, separated by commas; empty: 1 each",
        Accepts(_are_weights, "numbers above 0, separated by commas, are accepted"),
    )  # fmt: skip
    dpo_label_smoothing: float = flag(
        0.0, "assumed share of wrong preferences, for " + ", ".join(SMOOTHED),
        Accepts(lambda share: 0 <= share < 0.5, "0 or more and below 0.5 is accepted"),
    )  # fmt: skip
    dpo_f_divergence: str = flag(
        "reverse_kl", "divergence that keeps the policy near the reference, for losses that compare two answers' log-ratios",
        choices=("reverse_kl", "forward_kl", "js", "alpha"),
    )  # fmt: skip
    dpo_f_alpha: float = flag(0.5, "alpha of --dpo_f_divergence alpha")
    dpo_ld_alpha: float = flag(
        1.0, "weight of the tokens by which an answer is longer than the other one, in policy and reference; 1: the same as others",
        SHARE,
    )  # fmt: skip
    dpo_wpo: int = flag(0, "1: weight each pair by how likely the policy itself is to write its answers (WPO)", SWITCH)
    simpo_gamma: float = flag(0.5, "margin of simpo", NOT_NEGATIVE)
    dpop_lambda: float = flag(50.0, "weight of dpop's penalty on chosen answers less likely than under the reference", NOT_NEGATIVE)
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
        """The weights of the losses, if the numbers match."""
        return tuple(map(float, _names(self.dpo_loss_weights))) if self.dpo_loss_weights else (1.0,) * len(self.losses)

    @property
    def uses_reference(self) -> bool:
        """Whether any of its preference losses uses a reference."""
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
