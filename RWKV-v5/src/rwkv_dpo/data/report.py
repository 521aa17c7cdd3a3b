"""What preparation tells: the figures of report.json, the table that is printed of them, and what of it is to be warned of."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.data.preference import Notes

_PERCENTILES = (50, 90, 99)


def length_percentiles(pairs: PairSet) -> dict[str, dict[str, int]]:
    """Tokens of prompts and answers, and how many both answers of a pair begin with alike: {"prompt": {"p50": 120, ..., "max":
    2048}, "chosen": ..., "rejected": ..., "common_prefix": ...}. A percentile is the least length that so many percent do not
    exceed. Empty without pairs."""
    if not len(pairs):
        return {}
    lengths = pairs.lengths
    common = np.array([_n_common(*pairs.pair(i)[1:]) for i in range(len(pairs))])
    columns = {"prompt": lengths[:, 0], "chosen": lengths[:, 1], "rejected": lengths[:, 2], "common_prefix": common}
    return {name: _percentiles(column) for name, column in columns.items()}


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


def no_pair_of(source: str | Path, notes: Notes) -> str:
    """What to say of rows none of which became a pair."""
    return f"{source}: no usable pair among its {notes.n_rows:,} rows" + (f"; the first is {notes.first_row}" if notes.first_row else "")


def as_table(
    counts: Mapping[str, Any] | None = None,
    lengths: Mapping[str, Mapping[str, int]] | None = None,
    reference: Mapping[str, Any] | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The parts that are given, as lines of text. counts: of prepare.Report; sources: of mixtures.mixed; files:
    {"trainset.save": {"pairs": 8, "sha256": ...}}."""
    lines: list[str] = []
    if counts:
        n_dropped = counts["read"] - counts["kept"]
        lines += [f"{name:<34}{n:>9,}" for name, n in (("rows read", counts["read"]), ("kept", counts["kept"]), ("dropped", n_dropped))]
        lines += [f"  {reason:<32}{n:>9,}" for reason, n in counts["dropped"].items()]
        cuts = (("prompts cut", "cut_prompts"), ("pairs with an answer cut", "cut_answers"), ("tokens cut", "cut_tokens"))
        lines += [f"{name:<34}{counts[key]:>9,}" for name, key in cuts]
    if sources:
        has_shares = any("share" in row for row in sources.values())
        lines.append(_columns("sources", ("rows read", "kept", "share", "pairs") if has_shares else ("rows read", "kept")))
        for name, row in sources.items():
            share = (f"{row['share']:.1%}", f"{row['pairs']:,}") if has_shares else ()
            lines.append(_columns(f"  {name}", (f"{row['read']:,}", f"{row['kept']:,}", *share)))
    if lengths:
        lines.append(_columns("tokens", next(iter(lengths.values()))))
        lines += [_columns(f"  {name.replace('_', ' ')}", (f"{n:,}" for n in row.values())) for name, row in lengths.items()]
    if reference:
        answers = {name: row for name, row in reference.items() if isinstance(row, Mapping)}
        lines.append(_columns("reference log-probability", (name.replace("_", " ") for name in next(iter(answers.values())))))
        lines += [_columns(f"  {name}", (f"{value:,.2f}" for value in row.values())) for name, row in answers.items()]
        lines.append(f"{'ranked right by the reference':<34}{reference['ranked_right']:>9.1%}")
    if files:
        lines += [f"{name:<34}{file['pairs']:>9,} pairs  sha256 {file['sha256']}" for name, file in files.items()]
    return "\n".join(lines)


def _columns(name: str, cells: Iterable[str]) -> str:
    return f"{name:<26}" + "".join(f"{cell:>17}" for cell in cells)


def _percentiles(values: np.ndarray) -> dict[str, int]:
    found = {f"p{p}": int(np.percentile(values, p, method="inverted_cdf")) for p in _PERCENTILES}
    return {**found, "max": int(values.max())}


def _n_common(chosen: np.ndarray, rejected: np.ndarray) -> int:
    n = min(len(chosen), len(rejected))
    is_different = chosen[:n] != rejected[:n]
    return int(np.argmax(is_different)) if is_different.any() else n
