"""Figures of a set of pairs: lengths, scores, trees, scripts, and what the reference makes of it."""

import functools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from rwkv_dpo.data.pairs import PairSet

_PERCENTILES = (50, 90, 99)
_BINS = 40


def length_percentiles(pairs: PairSet) -> dict[str, dict[str, int]]:
    """Tokens of prompts and answers, and how many both answers of a pair begin with alike: {"prompt": {"p50": 120, ..., "max":
    2048}, "chosen": ..., "rejected": ..., "common_prefix": ...}. A percentile is the least length that so many percent do not
    exceed. Empty without pairs."""
    if not len(pairs):
        return {}
    common = np.array([_n_common(*pairs.pair(i)[1:]) for i in range(len(pairs))])
    columns = dict(zip(("prompt", "chosen", "rejected", "common_prefix"), [*pairs.lengths.T, common], strict=True))
    return {name: _percentiles(column) for name, column in columns.items()}


def tree_figures(pairs: PairSet) -> dict[str, int]:
    """{"trees": 400, "answers": 1600, "most_pairs": 6, "most_tokens": 900}: trees and the answers in them, and of the largest."""
    answers = np.unique(pairs.rows[:, 1:])
    most = (int(values.max(initial=0)) for values in (np.diff(pairs.trees), pairs.tree_tokens))
    return {"trees": pairs.n_trees, "answers": len(answers), **dict(zip(("most_pairs", "most_tokens"), most, strict=True))}


def preferences(pairs: PairSet) -> dict[str, Any]:
    """{"longer_preferred": 0.62, "gaps": {"pairs": 980, "p50": 1.0, "p90": 3.0, "p99": 4.5, "max": 5.0}}: of pairs whose answers differ in
    length the share whose longer one is chosen (None when none does), and by how much scores differ where they are known."""
    longer = np.sign(pairs.lengths[:, 1] - pairs.lengths[:, 2])
    n = int((longer != 0).sum())
    gaps = pairs.scores[:, 0] - pairs.scores[:, 1]
    known = gaps[~np.isnan(gaps)]
    figures = {f"p{p}": float(np.percentile(known, p, method="inverted_cdf")) for p in _PERCENTILES if len(known)}
    return {
        "longer_preferred": float((longer > 0).sum() / n) if n else None,
        "gaps": {"pairs": len(known), **figures, **({"max": float(known.max())} if len(known) else {})},
    }


def histograms(pairs: PairSet) -> dict[str, dict[str, Any]]:
    """{"tokens": {"edges": [0, 50, ...], "counts": {"prompt": [3, ...], "chosen": ..., "rejected": ...}}, "gaps": ...}, about 40 bars each;
    gaps only where scores are known."""
    found: dict[str, dict[str, Any]] = {}
    gaps = pairs.scores[:, 0] - pairs.scores[:, 1]
    columns = {"tokens": dict(zip(("prompt", "chosen", "rejected"), pairs.lengths.T, strict=True)), "gaps": {"gap": gaps[~np.isnan(gaps)]}}
    for name, values in columns.items():
        largest = max((float(column.max(initial=0)) for column in values.values()), default=0.0)
        if not largest:
            continue
        width = -(-largest // _BINS) if name == "tokens" else largest / _BINS
        edges = [width * i for i in range(_BINS + 1)]
        counts = {key: np.histogram(np.minimum(column, edges[-1]), edges)[0].tolist() for key, column in values.items()}
        found[name] = {"edges": edges, "counts": counts}
    return found


def scripts(texts: Iterable[str]) -> dict[str, int]:
    """How many texts are mostly in each script, the most frequent first: {"Latin": 900, "CJK": 80, "none": 3}. Languages are not told
    apart: what a script stands for is what Unicode names its letters by."""
    return dict(Counter(map(script_of, texts)).most_common())


def script_of(text: str) -> str:
    """The script of most letters of the text.

    >>> script_of("Привет, world"), script_of("こんにちは"), script_of("1 + 1")
    ('Cyrillic', 'Hiragana', 'none')
    """
    letters = Counter(text)
    found: Counter[str] = Counter()
    for letter, n in letters.items():
        if script := _script(letter):
            found[script] += n
    return found.most_common(1)[0][0] if found else "none"


def reference_summary(pairs: PairSet) -> dict[str, Any]:
    """Log-probabilities of the answers under the reference in nats, and the share of pairs (scored, at least one) whose chosen
    answer it finds likelier already."""
    n_tokens = pairs.lengths[:, 1:]
    summary: dict[str, Any] = {}
    for column, name in enumerate(("chosen", "rejected")):
        logps = pairs.ref_logps[:, column]
        summary[name] = {
            "mean": float(logps.mean()),
            "std": float(logps.std()),
            "min": float(logps.min()),
            "max": float(logps.max()),
            "mean_per_token": float(logps.sum() / n_tokens[:, column].sum()),
        }
    return {**summary, "ranked_right": float((pairs.ref_logps[:, 0] > pairs.ref_logps[:, 1]).mean())}


def lost_shares(counts: Mapping[str, Any], ctx_len: int) -> list[str]:
    """A line for each reason for which more than a fifth of the rows were dropped, or of the pairs cut; counts: of prepare.Report."""
    lost = [(n, counts["read"], f"rows were dropped: {reason}") for reason, n in counts["dropped"].items()]
    lost.append((counts["cut_prompts"], counts["kept"], f"pairs lost the beginning of their prompt to a ctx_len of {ctx_len}"))
    lost.append((counts["cut_answers"], counts["kept"], f"pairs lost the end of an answer to a ctx_len of {ctx_len}"))
    return [f"{n:,} of {total:,} {what}" for n, total, what in lost if n > total / 5]


def _percentiles(values: np.ndarray) -> dict[str, int]:
    found = {f"p{p}": int(np.percentile(values, p, method="inverted_cdf")) for p in _PERCENTILES}
    return {**found, "max": int(values.max())}


def _n_common(chosen: np.ndarray, rejected: np.ndarray) -> int:
    n = min(len(chosen), len(rejected))
    is_different = chosen[:n] != rejected[:n]
    return int(np.argmax(is_different)) if is_different.any() else n


@functools.lru_cache(maxsize=1 << 16)
def _script(letter: str) -> str:
    if not letter.isalpha():
        return ""
    first = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
    return first if first == "CJK" else first.capitalize()
