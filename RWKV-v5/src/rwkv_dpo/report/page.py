"""The report of a preparation as a page that needs nothing but itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_WIDTH, _HEIGHT = 640, 160


def as_page(report: Mapping[str, Any]) -> str:
    """HTML of what report.json holds. Whatever comes from the data is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["outline"] = outline
    return environment.get_template("page.html").render(report=report, width=_WIDTH, height=_HEIGHT)


def outline(counts: list[int], most: int) -> str:
    """The points of an SVG polyline around the bars of a histogram, as high as the page has room for `most`."""
    step = _WIDTH / len(counts)
    tops = [_HEIGHT * (1 - n / max(most, 1)) for n in counts]
    corners = [(round(x * step, 1), round(top, 1)) for i, top in enumerate(tops) for x in (i, i + 1)]
    return " ".join(f"{x},{y}" for x, y in [(0, _HEIGHT), *corners, (_WIDTH, _HEIGHT)])
