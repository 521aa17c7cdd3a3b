"""A run as a page that needs nothing but itself: no script, nothing fetched."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Template

from rwkv_dpo.report.columns import Columns
from rwkv_dpo.report.curves import Chart, Curve, charts
from rwkv_dpo.report.page import template

# Of a drawing, which is stretched to whatever room a page has.
WIDTH, HEIGHT = 1000, 300
_MOST_EVALUATIONS, _MOST_DOTS, _MOST_CHARACTERS = 30, 60, 4000


class About(NamedTuple):
    """What a page says beside the curves. state: in a few words. warnings: lines. flags: the run's, by name; defaults: of all flags.
    data: what it trains on, by what is counted. samples: {"prompt", "base", "now"} of one evaluation; any but the prompt may be missing."""

    title: str
    state: str
    total_steps: int
    warnings: Sequence[str] = ()
    flags: Mapping[str, Any] = {}
    defaults: Mapping[str, Any] = {}
    data: Mapping[str, Any] = {}
    samples: Sequence[Mapping[str, Any]] = ()
    samples_step: int = 0


def as_run_page(about: About, train: Columns, held_out: Columns) -> str:
    """HTML of a run's records. Whatever comes from files and flags is escaped."""
    drawn = charts(train, held_out)
    changed = {name: value for name, value in about.flags.items() if name in about.defaults and value != about.defaults[name]}
    return _template().render(
        about=about, step=int(max(train.steps.max(initial=0), held_out.steps.max(initial=0))), charts=drawn, width=WIDTH, height=HEIGHT,
        changed=changed, others={name: value for name, value in about.flags.items() if name not in changed},
        evaluations=evaluations(held_out), samples=[_sample(sample) for sample in about.samples],
    )  # fmt: skip


@functools.cache
def _template() -> Template:
    return template("run_page.html", line=line, dots=dots, ticks=ticks, figures=figures, number=_number)


def _number(value: float, form: str) -> str:
    return format(float(value), form)


def line(curve: Curve, chart: Chart) -> str:
    """The "d" of a curve's SVG path: a line, or the outline of a band."""
    places = _places(curve.steps, curve.values, chart)
    if curve.style == "band":
        return f"M{' '.join(places + _places(curve.steps, curve.upper, chart)[::-1])}Z"
    return f"M{' '.join(places)}"


def dots(curve: Curve, chart: Chart) -> str:
    """The "d" of what marks single points: lines of no length, whose round ends stay round however a drawing is stretched. "" without."""
    n = len(curve.steps)
    if n > 1 and (curve.style != "points" or n > _MOST_DOTS):
        return ""
    return "".join(f"M{place}h0" for place in _places(curve.steps, curve.values, chart))


def _places(steps: np.ndarray, values: np.ndarray, chart: Chart) -> list[str]:
    low, high = chart.bounds
    first, last = chart.steps
    x = (steps - first) / (last - first) * WIDTH if last > first else np.full(len(steps), WIDTH / 2)
    y = (high - np.clip(values, low, high)) / (high - low) * HEIGHT
    return [f"{a:.0f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]


def ticks(bounds: tuple[float, float], most: int = 4) -> list[dict[str, Any]]:
    """Round numbers within bounds, about so many: [{"text": "0.5", "at": 0.25}], with how far each is from the upper one.

    >>> [tick["text"] for tick in ticks((0.0, 1.0))]
    ['0', '0.5', '1']
    """
    low, high = bounds
    width = 10.0 ** math.floor(math.log10((high - low) / most))
    width *= next(factor for factor in (1, 2, 5, 10) if width * factor * most >= high - low)
    numbers = [width * i for i in range(math.ceil(low / width - 1e-9), math.floor(high / width + 1e-9) + 1)]
    return [{"text": _short(number), "at": (high - number) / (high - low)} for number in numbers]


def _short(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.6g}"


def evaluations(held_out: Columns) -> dict[str, list[str]]:
    """A few evaluations, written out: by the name of the figure, a text for each."""
    shown = {
        "step": ("step", ",.0f"), "loss": ("loss_dpo", ".4f"), "accuracy": ("rewards/accuracies", ".3f"),
        "margin": ("rewards/margins", ".3f"), "corpus loss": ("corpus_loss", ".4f"),
    }  # fmt: skip
    rows = np.unique(np.linspace(0, len(held_out) - 1, min(len(held_out), _MOST_EVALUATIONS)).round().astype(int))
    columns = {title: held_out[name][rows] for title, (name, _) in shown.items() if name in held_out}
    return {title: [format(value, shown[title][1]) for value in column.tolist()] for title, column in columns.items()}


def figures(chart: Chart) -> list[dict[str, str]]:
    """A row for each curve of a chart but the faint ones: its first, lowest, highest and last value."""
    rows = []
    for curve in chart.curves:
        if curve.style not in ("raw", "band"):
            values = curve.values
            named = {"first": values[0], "lowest": values.min(), "highest": values.max(), "last": values[-1]}
            rows.append({"curve": curve.label, **{name: _number(value, chart.form) for name, value in named.items()}})
    return rows


def _sample(sample: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(sample[name])[:_MOST_CHARACTERS] for name in ("prompt", "base", "now") if sample.get(name) is not None}
