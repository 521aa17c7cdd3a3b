"""Pairs as trees: those with a common beginning become one sample of training, in which the common beginning is computed once.

Pairs are of one tree when their prompts are the same, as those of a ranking are, or when the prompt of the one is a dialogue that continues
after an answer of the other.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from rwkv_dpo.data.pairs import Pair, PairSet

_BASE = np.uint64(0x9E3779B97F4A7C15)


class Grown(NamedTuple):
    """Pairs in trees, the number that each had before, and the number of the first pair that it is related to, itself perhaps: trees
    that were cut apart have one."""

    pairs: PairSet
    before: list[int]
    relatives: list[int]


def grow(pairs: PairSet, tree_tokens: int) -> Grown:
    """The same pairs, trees in the order of their first ones. A tree of more than tree_tokens tokens, its prompts and answers counted
    once each, is cut into several, each with the prompt."""
    families = _families(pairs)
    trees = [tree for family in families for tree in _cut(pairs, family, tree_tokens)]
    tokens: list[np.ndarray] = []
    rows: list[tuple[int, ...]] = []
    for tree in trees:
        of_content: dict[tuple[bytes, ...], int] = {}
        for i in tree:
            pair = pairs.pair(i)
            for key, row in zip(_keys(pair), pair, strict=True):
                if key not in of_content:
                    of_content[key] = len(tokens)
                    tokens.append(row)
            rows.append(tuple(of_content[key] for key in _keys(pair)))
    before = [i for tree in trees for i in tree]
    first_of = {i: family[0] for family in families for i in family}
    grown = PairSet(
        np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
        np.cumsum([0, *map(len, tokens)]).astype(np.int64),
        np.array(rows, np.int64).reshape(-1, 3),
        np.cumsum([0, *map(len, trees)]).astype(np.int64),
        pairs.scores[before],
        pairs.ref_logps[before],
        pairs.header,
    )
    return Grown(grown, before, [first_of[i] for i in before])


def _keys(pair: Pair) -> tuple[tuple[bytes, ...], ...]:
    """What makes two rows of a tree one: its prompts by their tokens, answers by those of the prompt too."""
    prompt, chosen, rejected = (row.tobytes() for row in pair)
    return (prompt,), (prompt, chosen), (prompt, rejected)


def _cut(pairs: PairSet, family: list[int], tree_tokens: int) -> Iterator[list[int]]:
    tree: list[int] = []
    sizes: dict[tuple[bytes, ...], int] = {}
    for i in family:
        pair = pairs.pair(i)
        more = dict(zip(_keys(pair), map(len, pair), strict=True))
        if tree and sum((sizes | more).values()) > tree_tokens:
            yield tree
            tree, sizes = [], {}
        tree.append(i)
        sizes |= more
    if tree:
        yield tree


def _families(pairs: PairSet) -> list[list[int]]:
    """The pairs of each tree, as they were numbered; families in the order of their first pairs."""
    of_prompt: dict[bytes, list[int]] = {}
    for i in range(len(pairs)):
        of_prompt.setdefault(pairs.pair(i)[0].tobytes(), []).append(i)
    firsts = {members[0]: members for members in of_prompt.values()}
    before = {}
    # Where dialogues may go on, by the hash of all tokens so far.
    ends: dict[int, list[int]] = {}
    for first, members in firsts.items():
        for i in members:
            prompt, *answers = pairs.pair(i)
            for answer in answers:
                # The last token may be another one where the dialogue continues.
                ends.setdefault(_hashes(np.concatenate([prompt, answer[:-1]]))[-1].item(), []).append(first)
    known = np.array(sorted(ends), np.uint64)
    for first in firsts:
        prompt = pairs.pair(first)[0]
        hashes = _hashes(prompt)
        found = known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
        for at in reversed(np.flatnonzero(found).tolist()):
            parents = (parent for parent in ends[hashes[at].item()] if _goes_on(pairs, firsts[parent], prompt[: at + 1]))
            if (parent := next(parents, first)) != first:
                before[first] = parent
                break
    families: dict[int, list[int]] = {}
    for first, members in firsts.items():
        root = first
        while root in before:
            root = before[root]
        families.setdefault(root, []).extend(members)
    return sorted(map(sorted, families.values()))


def _goes_on(pairs: PairSet, members: list[int], beginning: np.ndarray) -> bool:
    """Whether a prompt that has this beginning continues after an answer of these pairs."""
    prompt = pairs.pair(members[0])[0]
    answers = (answer for i in members for answer in pairs.pair(i)[1:])
    return len(prompt) < len(beginning) and any(np.array_equal(np.concatenate([prompt, answer[:-1]]), beginning) for answer in answers)


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """uint64 [T], of every beginning of the tokens, the shortest first: a polynomial modulo 2**64."""
    powers = np.full(len(tokens), _BASE)
    powers[:1] = 1
    return np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * np.cumprod(powers))
