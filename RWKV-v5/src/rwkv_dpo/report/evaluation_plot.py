"""An evaluation as a picture: for each file of pairs accuracy, calibration, accuracy by length and margins of every checkpoint."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Figures = Mapping[str, Any]
# Told apart by every kind of colour vision (Okabe and Ito 2008), and in grey by marker and line.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS, _LINES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")
_WIDTH, _HEIGHT, _DPI = 17.0, 4.4, 110


def write_plot(reports: Sequence[Figures], file: BinaryIO) -> None:
    """A PNG of reports as evaluation_table.as_table takes them, with the pairs of at least one file."""
    names = [f"{i}: {'/'.join(Path(report['checkpoint']).parts[-2:])}" for i, report in enumerate(reports, start=1)]
    # A dollar sign in the name of a file begins no formula.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 10}):
        files = list(reports[0]["pairs"])
        n_lines = -(-len(names) // 4)
        # Not by pyplot, which keeps figures, and asks for a display.
        figure = Figure(figsize=(_WIDTH, _HEIGHT * len(files) + 0.3 * n_lines + 0.2), layout="constrained", dpi=_DPI)
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.1)  # type: ignore[union-attr, call-arg]  # a constrained layout, as asked for
        parts = figure.subfigures(len(files), 1, squeeze=False)[:, 0]
        for part, name in zip(parts, files, strict=True):
            columns = [report["pairs"][name] for report in reports]
            part.suptitle(f"{'/'.join(Path(name).parts[-2:])}: {columns[0]['n_pairs']:,} pairs of {columns[0]['n_prompts']:,} prompts")
            panels = part.subplots(1, 4)
            for panel, draw in zip(panels, (_accuracy, _calibration, _by_length, _margins), strict=True):
                draw(panel, columns)
                panel.grid(alpha=0.3)
                panel.spines[["top", "right"]].set_visible(False)
        handles = [figure.axes[3].plot([], [], label=name, **_style(i))[0] for i, name in enumerate(names)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(names), 4), frameon=False)
        figure.savefig(file, format="png", dpi=_DPI)


def _style(i: int) -> dict[str, Any]:
    return {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "linestyle": _LINES[i % len(_LINES)]}


def _accuracy(panel: Axes, columns: Sequence[Figures]) -> None:
    """A row a column: the accuracies above one another, each with its interval."""
    kinds = [("logps/accuracies", "preferences", -0.12, "full")]
    kinds += [("rewards/accuracies", "rewards (open)", 0.12, "none")] if "rewards/accuracies" in columns[0] else []
    for i, column in enumerate(columns):
        for name, _, offset, fill in kinds:
            value, bounds = column[name], column["intervals"][name]
            reach = [[max(value - bounds[0], 0)], [max(bounds[1] - value, 0)]] if bounds else None
            style = {"color": _style(i)["color"], "marker": _style(i)["marker"], "fillstyle": fill}
            panel.errorbar([value], [i + 1 + offset], xerr=reach, capsize=4, linestyle="none", **style)
    chance = panel.axvline(columns[0]["lengths"]["longer_is_chosen"], color="grey", linestyle=":")
    panel.legend([chance], ["the longer answer is chosen"], loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    panel.set(xlabel=f"accuracy: {' and '.join(what for _, what, _, _ in kinds)}, 95 % interval", ylabel="checkpoint", xlim=(-0.03, 1.03))
    panel.set(yticks=range(1, len(columns) + 1), ylim=(len(columns) + 0.6, 0.4))


def _calibration(panel: Axes, columns: Sequence[Figures]) -> None:
    panel.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":")
    for i, column in enumerate(columns):
        bins = [one for one in (column.get("calibration") or {"bins": []})["bins"] if one["pairs"]]
        panel.plot([one["confidence"] for one in bins], [one["accuracy"] for one in bins], **_style(i))
    if not any(column.get("calibration") for column in columns):
        panel.text(0.5, 0.6, "without rewards", transform=panel.transAxes, ha="center", bbox={"facecolor": "white", "edgecolor": "none"})
    panel.set(xlabel="sigmoid(|reward margin|)", ylabel="share that is right", xlim=(0.485, 1.015), ylim=(-0.03, 1.03))
    panel.set_title("calibration", fontsize=10)


def _by_length(panel: Axes, columns: Sequence[Figures]) -> None:
    groups = columns[0]["lengths"]["groups"]
    for i, column in enumerate(columns):
        shares = [group["accuracies"]["logps"] for group in column["lengths"]["groups"]]
        panel.plot(range(len(shares)), [math.nan if share is None else share for share in shares], **_style(i))
    labels = [f"{group['chosen_is'].replace(' ', chr(10), 1)}\n({group['pairs']:,})" for group in groups]
    panel.set(xlabel="chosen answer (pairs), by tokens", ylabel="preference accuracy", ylim=(-0.03, 1.03), xlim=(-0.4, len(groups) - 0.6))
    panel.set_xticks(range(len(groups)), labels)
    panel.set_title("accuracy by length", fontsize=10)


def _margins(panel: Axes, columns: Sequence[Figures]) -> None:
    panel.axvline(0, color="grey", linestyle=":")
    for i, column in enumerate(columns):
        style = {name: value for name, value in _style(i).items() if name != "marker"}
        panel.stairs(column["margins"]["pairs"], column["margins"]["edges"], linewidth=1.6, **style)
    panel.set(xlabel="margin, log p(chosen) - log p(rejected) (nats)", ylabel="pairs")
    panel.set_title("margins", fontsize=10)
