"""Prompts that are nearly the same, within a split and between splits: MinHash (Broder 1997) finds candidates, their words decide."""

import re
from collections.abc import Sequence
from typing import Any

from datasketch import MinHash, MinHashLSH

# The share of three-word sequences, of all that either has, which two prompts have to have in common.
LEAST_SIMILARITY = 0.8
_N_HASHES, _N_WORDS = 128, 3
# So many candidates of a prompt are looked at: a template that fills a whole set would have its square.
_MOST_CANDIDATES = 100
# A letter of a script without spaces is a word.
_WORD = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")


def near_duplicates(prompts: Sequence[str], splits: Sequence[str], n_shown: int = 10) -> dict[str, Any]:
    """Of prompts, each in the split beside it: {"prompts": 900, "within": {"train": 12}, "between": {"train, valid": 2}, "first":
    [{"similarity": 0.91, "splits": ["train", "valid"], "prompts": ["...", "..."]}]}. Prompts that are equal are one; each that has a near
    duplicate counts once within its split and once with every other split; the first are the most similar ones, those between
    splits before the others."""
    of_prompt = dict(zip(prompts, splits, strict=True))
    texts = list(of_prompt)
    index = MinHashLSH(threshold=LEAST_SIMILARITY, num_perm=_N_HASHES)
    hashes = MinHash.generator((list(_sequences(text)) for text in texts), num_perm=_N_HASHES, seed=1)
    within: dict[str, set[int]] = {}
    between: dict[tuple[str, str], set[int]] = {}
    found: list[tuple[bool, float, int, int]] = []
    for i, minhash in enumerate(hashes):
        for j in sorted(index.query(minhash))[:_MOST_CANDIDATES]:
            similarity = _similarity(texts[i], texts[j])
            if similarity < LEAST_SIMILARITY:
                continue
            one, other = sorted((of_prompt[texts[i]], of_prompt[texts[j]]))
            (within.setdefault(one, set()) if one == other else between.setdefault((one, other), set())).update((i, j))
            found.append((one == other, -similarity, j, i))
        index.insert(i, minhash)
    shown = [
        {"similarity": -similarity, "splits": [of_prompt[texts[i]] for i in both], "prompts": [texts[i] for i in both]}
        for _, similarity, *both in sorted(found)[:n_shown]
    ]
    return {
        "prompts": len(texts),
        "within": {name: len(numbers) for name, numbers in sorted(within.items())},
        "between": {", ".join(names): len(numbers) for names, numbers in sorted(between.items())},
        "first": shown,
    }


def _sequences(text: str) -> set[bytes]:
    words = _WORD.findall(text.casefold())
    return {" ".join(words[i : i + _N_WORDS]).encode() for i in range(max(len(words) - _N_WORDS + 1, 1))}


def _similarity(a: str, b: str) -> float:
    """Jaccard's, of their sequences of words."""
    one, other = _sequences(a), _sequences(b)
    return len(one & other) / len(one | other)
