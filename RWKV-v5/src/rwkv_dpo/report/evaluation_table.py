"""An evaluation as lines of text: a column a checkpoint, a block of rows a file, and the answers below."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Figures = Mapping[str, Any]
_LABELS = 26
# Those with an interval are followed by it, and by the interval of the difference to the first column.
_OF_PAIRS = (
    ("preference accuracy", "logps/accuracies", "{:.3f}", True),
    ("mean margin (nats)", "logps/margins", "{:+.2f}", True),
    ("reward accuracy", "rewards/accuracies", "{:.3f}", True),
    ("reward margin", "rewards/margins", "{:+.3f}", True),
    ("beta of the rewards", "dpo_beta", "{:g}", False),
)
_OF_CALIBRATION = (("calibration error (ECE)", "ece"), ("Brier score", "brier"), ("log loss (nats)", "log_loss"))
_WHOSE = {"logps": "preference", "rewards": "reward"}
_Rows = list[tuple[str, list[str]]]


def as_table(reports: Sequence[Figures]) -> str:
    """What `--out` writes, a report a checkpoint: {"checkpoint": "out/rwkv-final.pth", "pairs": {"testset.save": compare.pair_figures},
    "corpora": {"corpus": compare.corpus_figures}, "answers": [{"prompt": "Why?", "answer": "Because."}]}, any of the last three."""
    names = ["/".join(Path(report["checkpoint"]).parts[-2:]) for report in reports]
    rows: _Rows = [("", names)]
    for kind, rows_of, told in (("pairs", _pair_rows, _told_pairs), ("corpora", _corpus_rows, _told_windows)):
        files = [list(column) for column in zip(*(report.get(kind, {}).items() for report in reports), strict=True)]
        for of_file in files:
            columns = [figures for _, figures in of_file]
            rows += [(f"\n{of_file[0][0]}: {told(columns[0])}", [])] if len(files) > 1 else []
            rows += rows_of(columns)
    width = max(12, *(len(cell) + 2 for _, cells in rows for cell in cells))
    lines = [(f"{label:{_LABELS}}" + "".join(f"{cell:>{width}}" for cell in cells)).rstrip() for label, cells in rows]
    return "\n".join([*lines, *_answers(names, reports)])


def _pair_rows(columns: Sequence[Figures]) -> _Rows:
    rows: _Rows = []
    for label, name, form, has_interval in _OF_PAIRS:
        if name in columns[0]:
            rows.append((label, _cells(form, (column[name] for column in columns))))
            rows += _spread(columns, name, form) if has_interval else []
    if calibrated := [column["calibration"] or {} for column in columns if "calibration" in column]:
        rows += [(label, _cells("{:.3f}", (one.get(name) for one in calibrated))) for label, name in _OF_CALIBRATION]
    lengths = [column["lengths"] for column in columns]
    rows.append(("accuracy, if chosen is", [" / ".join(_WHOSE[name] for name in lengths[0]["correlations"])] * len(columns)))
    for groups in zip(*(one["groups"] for one in lengths), strict=True):
        label = f"  {groups[0]['chosen_is']} ({groups[0]['pairs']:,})"
        rows.append((label, [" / ".join(_cells("{:.3f}", group["accuracies"].values())) for group in groups]))
    rows.append(("longer answer is chosen", _cells("{:.3f}", (one["longer_is_chosen"] for one in lengths))))
    for label, name in (("r of margin and length", "logps"), ("r of reward and length", "rewards")):
        if name in lengths[0]["correlations"]:
            rows.append((label, _cells("{:+.2f}", (one["correlations"][name] for one in lengths))))
    return rows


def _corpus_rows(columns: Sequence[Figures]) -> _Rows:
    losses = [column["corpus_loss"] for column in columns]
    rows = [("corpus loss (nats/token)", _cells("{:.4f}", losses)), *_spread(columns, "corpus_loss", "{:.4f}", "{:+.4f}")]
    rows.append(("corpus perplexity", _cells("{:.2f}", (column["corpus_perplexity"] for column in columns))))
    if len(columns) > 1 and losses[0]:
        rows.append(("change of corpus loss", _cells("{:+.1f} %", (100 * (loss / losses[0] - 1) for loss in losses))))
    if "kl" in columns[0]:
        rows.append(("KL to the first column", _cells("{:.4f}", (column["kl"] for column in columns))))
        rows.append(("  95 % interval", _intervals("{:.4f}", (column["intervals"].get("kl") for column in columns))))
    return rows


def _spread(columns: Sequence[Figures], name: str, form: str, difference: str = "") -> _Rows:
    """difference: how differences are written, where not as the figure with a sign."""
    rows = [("  95 % interval", _intervals(form, (column["intervals"][name] for column in columns)))]
    apart = [column.get("differences", {}).get(name, {}).get("interval") for column in columns]
    if any(apart):
        rows.append(("  more than the first by", _intervals(difference or f"{{:+{form[2:].lstrip('+')}", apart)))
    return rows


def _cells(form: str, values: Iterable[float | None]) -> list[str]:
    return ["-" if value is None else form.format(value) for value in values]


def _intervals(form: str, bounds: Iterable[Sequence[float] | None]) -> list[str]:
    return [" to ".join(form.format(bound) for bound in both or ()) for both in bounds]


def _told_pairs(figures: Figures) -> str:
    return f"{figures['n_pairs']:,} pairs of {figures['n_prompts']:,} prompts"


def _told_windows(figures: Figures) -> str:
    return f"{figures['n_windows']:,} windows"


def _answers(names: Sequence[str], reports: Sequence[Figures]) -> list[str]:
    lines: list[str] = []
    for of_prompt in zip(*(report.get("answers", []) for report in reports), strict=True):
        if len(reports[0]["answers"]) > 1:
            lines.append(f"\nUser: {of_prompt[0]['prompt'].strip()}")
        lines += [f"\n{name} answers:\n  {one['answer']}" for name, one in zip(names, of_prompt, strict=True)]
    return lines
