"""Pairs made of rankings: which answers of a prompt are set against each other (--rank_pairs, --min_gap).

    best_worst  the best answer and the worst
    best_rest   the best answer and each of the others
    adjacent    answers of neighbouring scores
    all         every two answers
    random:N    N of all, drawn by seed and prompt

Two answers with the same score are no pair, whatever the way.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.preference import Dropped, Notes, Preference, Ranking

UNPAIRED, TIE, ONE_ANSWER = "unpaired", "tie", "a ranking with one answer"
SMALL_GAP = "gap below --min_gap"
UNUSED = "answers of rankings are in no pair"
_Pairs = list[tuple[int, int]]  # (better, worse)


@dataclass(frozen=True)
class Pairing:
    """How pairs are made: one of RANK_PAIRS or random:N, and by how much the chosen answer has to be better by its scores."""

    rank_pairs: str = "best_worst"
    min_gap: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank_pairs not in RANK_PAIRS and _n_random(self.rank_pairs) is None:
            refuse(f"--rank_pairs {self.rank_pairs}: accepted are {', '.join(RANK_PAIRS)}, and random:N with an N of at least 1")
        if not 0 <= self.min_gap < float("inf"):
            refuse(f"--min_gap {self.min_gap}: at least 0 is accepted")


def paired(
    rows: Iterable[Preference | Ranking | Dropped], pairing: Pairing, notes: Notes
) -> Iterator[Preference | Dropped]:
    """Preferences of rows, in their order. Rankings that are parts wait for the others of their dialogue; those come last, each where
    its first part came. They are held in memory."""
    groups: dict[tuple[str, tuple[str, ...]], list[Ranking]] = {}
    for row in rows:
        if isinstance(row, Ranking) and row.is_part:
            groups.setdefault((row.system, row.turns), []).append(row)
        elif isinstance(row, Ranking):
            names = [f"{row.where}, answer {i}" for i in range(1, len(row.answers) + 1)]
            yield from _of_ranking(row, names, [row.where], pairing, notes)
        elif isinstance(row, Preference) and row.gap is not None and row.gap < pairing.min_gap:
            yield Dropped(row.where, SMALL_GAP)
        else:
            yield row
    for (system, turns), parts in groups.items():
        scores = tuple(part.scores[0] for part in parts)
        if len(set(scores)) == 1:
            yield from (Dropped(part.where, UNPAIRED) for part in parts)
            continue
        whole = Ranking(parts[0].where, system, turns, tuple(part.answers[0] for part in parts), scores)
        places = [part.where for part in parts]
        yield from _of_ranking(whole, places, places, pairing, notes)


def pairs_of(scores: Sequence[float], pairing: Pairing, prompt: str = "") -> list[tuple[int, int]]:
    """(better, worse) of every pair that is made of answers with these scores, the better ones first.

    >>> pairs_of([3, 9, 5], Pairing("best_rest"))
    [(1, 2), (1, 0)]
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    every = [(i, j) for i, j in itertools.combinations(order, 2) if scores[i] - scores[j] >= pairing.min_gap and scores[i] > scores[j]]
    if not every:
        return []
    if pairing.rank_pairs in RANK_PAIRS:
        return RANK_PAIRS[pairing.rank_pairs](every, scores)
    n = min(_n_random(pairing.rank_pairs) or 0, len(every))
    drawn = random.Random(f"{pairing.seed}/{prompt}").sample(range(len(every)), n)
    return [every[i] for i in sorted(drawn)]


def _best_worst(every: _Pairs, scores: Sequence[float]) -> _Pairs:
    is_extreme = (max(scores), min(scores))
    return [pair for pair in every if (scores[pair[0]], scores[pair[1]]) == is_extreme][:1]


def _best_rest(every: _Pairs, scores: Sequence[float]) -> _Pairs:
    return [pair for pair in every if pair[0] == every[0][0]]


def _adjacent(every: _Pairs, scores: Sequence[float]) -> _Pairs:
    levels = sorted(set(scores))
    return [(i, j) for i, j in every if levels.index(scores[i]) - levels.index(scores[j]) == 1]


RANK_PAIRS: dict[str, Callable[[_Pairs, Sequence[float]], _Pairs]] = {
    "best_worst": _best_worst,
    "best_rest": _best_rest,
    "adjacent": _adjacent,
    "all": lambda every, _: every,
}


def _of_ranking(
    ranking: Ranking, answers: list[str], rows: list[str], pairing: Pairing, notes: Notes
) -> Iterator[Preference | Dropped]:
    """answers: what each is called in messages, rows: where they were read."""
    n = len(ranking.answers)
    notes.counts[f"rankings of {n} answers"] += 1
    made = pairs_of(ranking.scores, pairing, "\n".join(ranking.turns))
    if not made:
        reason = ONE_ANSWER if n == 1 else TIE if len(set(ranking.scores)) == 1 else SMALL_GAP
        yield from (Dropped(where, reason) for where in rows)
        return
    if n_unused := n - len({i for pair in made for i in pair}):
        notes.counts[UNUSED] += n_unused
    for better, worse in made:
        where = rows[0] if n == 2 and len(rows) == 1 else f"{answers[better]} over {answers[worse]}"
        scores = ranking.scores[better], ranking.scores[worse]
        yield Preference(where, ranking.system, ranking.turns, ranking.answers[better], ranking.answers[worse], scores, ranking.where)


def _n_random(rank_pairs: str) -> int | None:
    name, colon, n = rank_pairs.partition(":")
    return int(n) if name == "random" and colon and n.isascii() and n.isdigit() and len(n) < 7 and int(n) > 0 else None
