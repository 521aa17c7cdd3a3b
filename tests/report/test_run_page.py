"""The page of a run: whole, harmless whatever files and flags say, and readable on a narrow display."""

import html
import json
import math
import re
import shutil
import subprocess

import numpy as np
import pytest
from html_reader import Reader
from rwkv_dpo.report.columns import Columns
from rwkv_dpo.report.curves import Chart, Curve, charts
from rwkv_dpo.report.drawing import as_png
from rwkv_dpo.report.run_page import About, as_run_page, dots, line, ticks

HOSTILE = "</pre><script>alert(1)</script>&<img src=x onerror=alert(1)>"
LONG = "/a/very/long/path/" + "x" * 200


def steps(n: int) -> Columns:
    draw = np.random.default_rng(0)
    return Columns({
        "step": i + 1, "loss": 0.7 - i / n / 2, "loss_dpo": draw.normal(), "loss_general": 0.6, "rewards/accuracies": draw.random(),
        "rewards/margins": draw.normal(), "grad_norm": draw.random(), "lr": 1e-4, "tokens_per_s": 900.0, "peak_memory_gb": 1.5,
    } for i in range(n))  # fmt: skip


def evaluations(n: int) -> Columns:
    return Columns({
        "step": 10 * i, "loss_dpo": 0.69 - i / 10, "rewards/accuracies": 0.5, "rewards/accuracies_95": [0.4, 0.6], "rewards/margins": i,
        "logps/chosen": -30.0, "logps/rejected": -31.0, "corpus_loss": 0.6, "lengths/preferred": 9.0,
    } for i in range(n))  # fmt: skip


ABOUT = About(
    f"dpo {HOSTILE}", f"running {HOSTILE}", 60, [f"warning {HOSTILE}"], {"load_model": LONG + HOSTILE, "lr_init": 3e-4, "beta1": 0.9},
    {"load_model": "", "lr_init": 6e-4, "beta1": 0.9}, {"training pairs": f"336, of {LONG}{HOSTILE}"},
    [{"prompt": f"Why? {HOSTILE}", "base": LONG, "now": f"Because. {HOSTILE}"}, {"prompt": "How?"}], 50,
)  # fmt: skip


def test_the_page_has_all_its_parts():
    page = as_run_page(ABOUT, steps(53), evaluations(4))
    seen = Reader(page)
    titles = [chart.title for chart in charts(steps(53), evaluations(4))]
    assert len(titles) == 11
    assert seen.texts["title"] == [seen.texts["title"][0], *(f"{title} by optimizer step" for title in titles)]
    assert "step 53 of 60, running" in seen.text
    assert len(seen.texts["desc"]) == sum(tag == "svg" for tag, _ in seen.tags) == 11
    assert "held-out: first 0.6900, lowest 0.3900, highest 0.6900, last 0.3900." in seen.text
    assert [text for text in seen.texts["td"] if text in ("0.0003", "0.0006")] == ["0.0003", "0.0006"]
    for text in ("2 flags that differ", "the other 1", "after step 50", "the model at the start", "the model now", "How?"):
        assert text in seen.text
    ids = [attrs["id"] for _, attrs in seen.tags if "id" in attrs]
    named = [name for _, attrs in seen.tags if "aria-labelledby" in attrs for name in attrs["aria-labelledby"].split()]
    assert sorted(ids) == sorted(named)
    assert len(set(ids)) == 22


def test_nothing_of_files_and_flags_becomes_markup_and_nothing_is_fetched():
    page = as_run_page(ABOUT, steps(53), evaluations(4))
    seen = Reader(page)
    assert seen.text.count(HOSTILE) == 8
    assert {tag for tag, _ in seen.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    assert not any(name in ("href", "src", "xlink:href") or name.startswith("on") for _, attrs in seen.tags for name in attrs)
    assert not re.search(r"https?:|//\w|@import|url\(", page.replace(LONG, ""))


@pytest.mark.parametrize(("n_steps", "n_evaluations"), [(0, 0), (0, 1), (1, 0), (1, 1), (3, 2), (1000, 100)])
def test_a_run_of_any_length_and_of_any_figures_has_a_page(n_steps, n_evaluations):
    bare = About("run", "running", 0)
    train = Columns({"step": i, "loss": None if i % 7 == 3 else 0.5} for i in range(n_steps))
    page = as_run_page(bare, train, evaluations(n_evaluations))
    assert ("No step is over yet." in Reader(page).text) == (n_steps + n_evaluations == 0)
    assert "nan" not in page


def test_a_hundred_thousand_steps_stay_small():
    assert len(as_run_page(ABOUT, steps(100_000), evaluations(2000))) < 200_000


def test_a_curves_path_by_hand():
    curve = Curve("a", "train", "points", np.array([0.0, 5.0, 10.0]), np.array([0.0, 1.0, 0.25]))
    chart = Chart("a", "", "g", [curve])
    # A twentieth of room above and below.
    low, high, mid = f"{300 * 1.05 / 1.1:.1f}", f"{300 * 0.05 / 1.1:.1f}", f"{300 * 0.8 / 1.1:.1f}"
    assert line(curve, chart) == f"M0,{low} 500,{high} 1000,{mid}"
    assert dots(curve, chart) == f"M0,{low}h0M500,{high}h0M1000,{mid}h0"
    band = Curve("a", "train", "band", curve.steps, curve.values, np.array([1.0, 1.0, 0.5]))
    assert line(band, chart) == f"M0,{low} 500,{high} 1000,{mid} 1000,150.0 500,{high} 0,{high}Z"


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-3.2, 8.9), (1e-5, 9e-5), (0.95, 1.05), (1e6, 3e6), (-1e-9, 1e-9)])
def test_ticks_are_round_numbers_within_bounds(bounds):
    found = ticks(bounds)
    assert 2 <= len(found) <= 6
    values = [float(tick["text"].replace(",", "")) for tick in found]
    for value, tick in zip(values, found, strict=True):
        assert bounds[0] - 1e-12 <= value <= bounds[1] + 1e-12
        assert tick["at"] == pytest.approx((bounds[1] - value) / (bounds[1] - bounds[0]), abs=1e-4)
    widths = np.diff(values)
    assert widths == pytest.approx(widths[0], rel=1e-3)
    assert round(widths[0] / 10 ** math.floor(math.log10(widths[0]) + 1e-9), 3) in (1, 2, 5)


def test_the_picture_is_a_png_of_six_charts_at_most():
    picture = as_png("run $1", charts(steps(60), evaluations(3)))
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(picture[16:20], "big") == 1380
    assert int.from_bytes(picture[20:24], "big") == 600
    assert as_png("nothing yet", []).startswith(b"\x89PNG")


def test_a_browser_shows_it_without_scrolling_sideways(tmp_path):
    """400 pixels wide: headless browsers have a least width of their own, so that the page is put into a frame."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    page = as_run_page(ABOUT, steps(53), evaluations(40))
    (tmp_path / "frame.html").write_text(f"""
        <iframe id="page" style="width: 400px; height: 900px; border: 0"></iframe><pre id="told"></pre><script>
        const frame = document.getElementById("page");
        frame.onload = () => {{
            const root = frame.contentDocument.documentElement, plots = [...root.querySelectorAll(".plot svg")];
            document.getElementById("told").textContent = JSON.stringify({{
                width: root.clientWidth, needed: root.scrollWidth, plots: plots.map((plot) => plot.getBoundingClientRect().width),
                right: Math.max(...[...root.querySelectorAll("table")].map((table) => table.getBoundingClientRect().right)),
                wide: [...root.querySelectorAll("body *")].filter((one) => one.clientWidth && one.scrollWidth > one.clientWidth)
                    .map((one) => one.tagName)}});
        }};
        frame.srcdoc = {json.dumps(page).replace("</", "<" + chr(92) + "/")};
    </script>""")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=5000",
         "--dump-dom", f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    told = json.loads(html.unescape(re.search(r'<pre id="told">(\{.*?\})</pre>', done.stdout)[1]))
    assert told["width"] in (400, 385)  # with a scroll bar or without
    assert told["needed"] <= told["width"]
    assert told["wide"] == []
    assert told["right"] <= told["width"] - 15  # the margin of the page
    assert len(told["plots"]) == 11
    assert min(told["plots"]) > 250
