"""A run's main curves as a picture, by matplotlib."""

import io
from collections.abc import Sequence
from typing import Any

from rwkv_dpo.report.curves import Chart, Curve

_COLORS = {"train": "#3567a8", "held-out": "#c2570c", "chosen": "#1f7f4c", "rejected": "#b8344d", "preferred": "#7a4fb0"}
_LOOKS: dict[str, dict[str, Any]] = {"raw": {"alpha": 0.3, "linewidth": 0.7}, "points": {"marker": "."}}
_MOST, _COLUMNS, _INCHES = 6, 3, (4.6, 3.0)


def as_png(title: str, charts: Sequence[Chart]) -> bytes:
    """A PNG file with the first six charts, three in a row. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts = charts[:_MOST]
    n_rows = max(-(-len(charts) // _COLUMNS), 1)
    figure = Figure(figsize=(_COLUMNS * _INCHES[0], n_rows * _INCHES[1]))
    # matplotlib can find places for everything by itself, and takes as long again for it.
    figure.subplots_adjust(left=0.05, right=0.985, top=1 - 0.23 / n_rows, bottom=0.11 / n_rows, hspace=0.3, wspace=0.18)
    # $ would begin a formula.
    figure.suptitle(title.replace("$", r"\$"))
    for i, chart in enumerate(charts):
        axes = figure.add_subplot(n_rows, _COLUMNS, i + 1)
        for curve in chart.curves:
            _draw(axes, curve)
        axes.set_title(chart.title, fontsize=10, loc="left")
        axes.set_ylim(*chart.bounds)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        # Above the curves, where it hides none.
        axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=3, frameon=False)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _draw(axes: Any, curve: Curve) -> None:
    color = _COLORS[curve.kind]
    if curve.style == "band":
        axes.fill_between(curve.steps, curve.values, curve.upper, color=color, alpha=0.16, linewidth=0, label=curve.label)
        return
    # Names that begin so are left out of the legend.
    label = f"_{curve.label}" if curve.style == "raw" else curve.label
    axes.plot(curve.steps, curve.values, color=color, label=label, **_LOOKS.get(curve.style, {}))
