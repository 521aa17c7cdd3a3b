"""Several sources of preferences in one set of pairs, all of each or in shares that the user names.

Which pairs stay depends on the seed and on what each of them says, not on the order of the rows.
"""

import glob
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.preference import Dropped, Preference
from rwkv_dpo.data.prepare import NextSource, Prepared
from rwkv_dpo.data.prompts import seeded_fraction

_SHARE = re.compile(r"(?P<name>.+):(?P<share>\d{1,9}(\.\d{0,9})?|\.\d{1,9})")


class Source(NamedTuple):
    """A file, folder, glob or Hub id, and its share of the pairs beside those of the others; None: all that it has."""

    name: str
    share: Fraction | None = None


def parse_sources(texts: Sequence[str]) -> list[Source]:
    """What --source is given: names, or NAME:SHARE for all of them. Shares are weights, so that 0.7 and 0.3 say what 7 and 3 do.

    >>> parse_sources(["a.jsonl:0.7", "owner/name:0.3"])
    [Source(name='a.jsonl', share=Fraction(7, 10)), Source(name='owner/name', share=Fraction(3, 10))]
    """
    sources = [_parsed(text) for text in texts]
    names = [source.name for source in sources]
    if twice := next((name for name in names if names.count(name) > 1), ""):
        refuse(f"--source {twice}: is named twice")
    shares = [source.share for source in sources]
    if len({share is None for share in shares}) > 1:
        refuse(f"--source {' '.join(texts)}: either all have a share, as in NAME:0.7, or none")
    if len(sources) == 1 and shares[0] is not None:
        refuse(f"--source {texts[0]}: a share is one of several sources")
    if 0 in shares:
        refuse(f"--source {texts[shares.index(Fraction(0))]}: a share is above 0")
    return sources


def read_sources(
    sources: Sequence[Source], read: Callable[[str], Iterable[Preference | Dropped]]
) -> Iterator[Preference | Dropped | NextSource]:
    """What `read` makes of each of them, one after the other; rows of several are told apart."""
    for source in sources:
        if len(sources) == 1:
            yield from read(source.name)
            return
        yield NextSource(source.name)
        yield from (replace(one, where=_placed(source.name, one.where)) for one in read(source.name))


def mixed(prepared: Prepared, sources: Sequence[Source], seed: int) -> tuple[Prepared, dict[str, dict[str, Any]]]:
    """As many pairs as the shares allow, exact to a pair, and what became of each source: {"a.jsonl": {"read": 9, "kept": 8, "dropped":
    {"tie": 1}, "share": 0.7, "pairs": 7}}, none for a single one. `kept` is before the shares, `pairs` after. InputError when a source
    with a share has no pair."""
    found = prepared.report.by_source()
    if not found:
        return prepared, {}
    n_kept = [found[source.name]["kept"] for source in sources]
    for source, n in zip(sources, n_kept, strict=True):
        if source.share is not None and not n:
            refuse(f"--source {source.name}:{float(source.share):g}: no usable pair among its {found[source.name]['read']} rows")
    shares = [source.share for source in sources if source.share is not None]
    wanted = apportioned(n_kept, shares) if shares else n_kept
    rows: list[int] = []
    start = 0
    for source, n, n_wanted in zip(sources, n_kept, wanted, strict=True):
        rows += _drawn(prepared, range(start, start + n), n_wanted, seed)
        start += n
        share = {} if source.share is None else {"share": float(source.share / sum(shares))}
        found[source.name] |= {**share, "pairs": n_wanted}
    if len(rows) == start:
        return prepared, found
    return prepared.select(rows), found


def apportioned(available: Sequence[int], shares: Sequence[Fraction]) -> list[int]:
    """How many of each, of as many as there are in these shares: their exact parts, rounded down, and the rest to the largest fractions.

    >>> apportioned([100, 10], [Fraction(7), Fraction(3)])
    [23, 10]
    """
    parts = [share / sum(shares) for share in shares]
    total = min(math.floor(n / part) for n, part in zip(available, parts, strict=True))
    counts = [math.floor(total * part) for part in parts]
    by_rest = sorted(range(len(parts)), key=lambda i: counts[i] - total * parts[i])
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _drawn(prepared: Prepared, rows: range, n: int, seed: int) -> list[int]:
    if n == len(rows):
        return list(rows)

    def place(row: int) -> tuple[float, str]:
        content = hashlib.blake2b(b"/".join(tokens.tobytes() for tokens in prepared.pairs.pair(row)), digest_size=16).hexdigest()
        return seeded_fraction("mix", seed, content), content

    return sorted(sorted(rows, key=place)[:n])


def _parsed(text: str) -> Source:
    match = _SHARE.fullmatch(text)
    if not match or os.path.exists(text) or (glob.has_magic(text) and glob.glob(text, recursive=True)):
        return Source(text)
    return Source(match["name"], Fraction(match["share"]))


def _placed(name: str, where: str) -> str:
    # What a malformed row was refused with names its file already.
    return where if where.startswith(name) else f"{name}: {where}"
