"""The report of a preparation as a page that needs nothing but itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

_WIDTH, _HEIGHT = 640, 160


def as_page(report: Mapping[str, Any]) -> str:
    """HTML of what report.json holds. Whatever comes from the data is escaped."""
    return template("page.html", outline=outline).render(report=report, width=_WIDTH, height=_HEIGHT)


def template(name: str, **filters: Callable[..., object]) -> Template:
    """One of this folder's, which escapes whatever it is given."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(filters)
    return environment.get_template(name)


def outline(counts: list[int], most: int) -> str:
    """The points of an SVG polyline around the bars of a histogram, as high as the page has room for `most`."""
    step = _WIDTH / len(counts)
    tops = [_HEIGHT * (1 - n / max(most, 1)) for n in counts]
    corners = [(round(x * step, 1), round(top, 1)) for i, top in enumerate(tops) for x in (i, i + 1)]
    return " ".join(f"{x},{y}" for x, y in [(0, _HEIGHT), *corners, (_WIDTH, _HEIGHT)])
