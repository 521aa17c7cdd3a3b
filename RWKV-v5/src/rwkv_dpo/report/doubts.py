"""What looks wrong in preferences, by signs in their texts. Signs err; a person decides, who is shown the first of each."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Texts(NamedTuple):
    """A pair, as it is written out."""

    prompt: str
    chosen: str
    rejected: str


_MARKUP = re.compile(
    r"<\|[a-z_ ]{2,30}\|>|\[/?INST\]|</?s>|<</?SYS>>|###\s*(?:Human|Assistant|Instruction|Response|Input)\b|&(?:nbsp|amp|lt|gt|quot|#\d+);"
    r"|<br ?/?>|</?p>|\n(?:Human|Assistant|User):\s"
)
_REFUSAL = re.compile(
    r"\s*(?:(?:(?:i['\u2019]?m|i am) )?(?:very |really )?sorry[,.]? (?:but )?i (?:can|am|['\u2019]m|do)"
    r"|i apologi[sz]e,? but i (?:can|am|do)"
    r"|unfortunately,? i (?:can(?:no|['\u2019])?t|am)|i (?:can(?:no|['\u2019])?t|am (?:not able|unable) to|won['\u2019]t|will not) "
    r"|as an ai\b[^.]{0,60}\b(?:can(?:no|['\u2019])?t|do not|don['\u2019]t|am not|unable)\b"
    # In Chinese: sorry, excuse me, as an AI.
    r"|\u5f88?\u62b1\u6b49|\u5bf9\u4e0d\u8d77|\u4f5c\u4e3a(?:\u4e00\u4e2a)?(?:ai|\u4eba\u5de5\u667a\u80fd))",
    re.IGNORECASE,
)
_N_WORDS, _N_SHOWN, _N_CHARACTERS = 50, 3, 160


def _is_cut(answer: str) -> bool:
    """Long, and ending in the middle of a sentence."""
    text = answer.rstrip()
    return len(text.split()) >= _N_WORDS and (text[-1].isalnum() or text[-1] in ",;(-")


def _same_but_for_spacing(pair: Texts) -> bool:
    chosen, rejected = (" ".join(answer.casefold().split()) for answer in (pair.chosen, pair.rejected))
    return chosen == rejected


_SIGNS: dict[str, tuple[Callable[[Texts], bool], Callable[[Texts], str]]] = {
    "chosen answers end in the middle of a sentence": (
        lambda pair: _is_cut(pair.chosen), lambda pair: pair.chosen.rstrip()[-_N_CHARACTERS:]
    ),
    "rejected answers end in the middle of a sentence": (
        lambda pair: _is_cut(pair.rejected), lambda pair: pair.rejected.rstrip()[-_N_CHARACTERS:]
    ),
    "pairs have markup left over in an answer": (
        lambda pair: bool(_MARKUP.search(pair.chosen) or _MARKUP.search(pair.rejected)),
        lambda pair: _around(_MARKUP, pair.chosen) or _around(_MARKUP, pair.rejected),
    ),
    "pairs prefer a refusal to an answer": (
        lambda pair: bool(_REFUSAL.match(pair.chosen)) and not _REFUSAL.match(pair.rejected), lambda pair: pair.chosen[:_N_CHARACTERS]
    ),
    "pairs have answers that differ in case and spacing alone": (_same_but_for_spacing, lambda pair: pair.chosen[:_N_CHARACTERS]),
}  # fmt: skip


def doubts(pairs: Sequence[Texts]) -> list[dict[str, Any]]:
    """[{"what": "pairs prefer a refusal to an answer", "pairs": 12, "share": 0.01, "first": [{"pair": 31, "text": "I'm sorry, but"}]}] for
    every sign that is there. Pairs are counted from 1."""
    found = []
    for what, (is_there, excerpt) in _SIGNS.items():
        numbers = [i for i, pair in enumerate(pairs) if is_there(pair)]
        if numbers:
            first = [{"pair": i + 1, "text": excerpt(pairs[i]).strip()} for i in numbers[:_N_SHOWN]]
            found.append({"what": what, "pairs": len(numbers), "share": len(numbers) / len(pairs), "first": first})
    return found


def _around(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return text[max(match.start() - _N_CHARACTERS // 2, 0) : match.end() + _N_CHARACTERS // 2] if match else ""
