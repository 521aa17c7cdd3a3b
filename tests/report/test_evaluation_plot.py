"""The picture of an evaluation: what is drawn is what the figures say."""

import io

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.evaluation.compare import pair_figures
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.report.evaluation_plot import write_plot


def reports_of(n_columns: int, is_scored: bool = True, n_pairs: int = 40, files: tuple[str, ...] = ("t/testset.save",)) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = [tuple(rng.integers(0, 61, n) for n in rng.integers(1, 20, 3)) for _ in range(n_pairs)]
    pairs = pack_pairs(rows, rng.normal(-20, 5, (n_pairs, 2)) if is_scored else None)
    columns = [rng.normal(-20, 5, (n_pairs, 2)) for _ in range(n_columns)]
    figures = pair_figures(pairs, columns, [dpo(0.1)] * n_columns, 0)
    names = ["a/$x^$_b.pth", "_out/rwkv-final.pth", *(f"out/rwkv-{i}.pth" for i in range(n_columns))]
    return [{"checkpoint": name, "pairs": dict.fromkeys(files, own)} for name, own in zip(names, figures, strict=False)]


@pytest.fixture
def drawn(monkeypatch):
    """Draws reports; the figure, and the size of the PNG."""

    def draw(reports):
        figures = []
        savefig = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda self, *given, **more: (figures.append(self), savefig(self, *given, **more))[1])
        file = io.BytesIO()
        write_plot(reports, file)
        content = file.getvalue()
        assert content.startswith(b"\x89PNG\r\n")
        # The width and height that its first chunk, IHDR, begins with.
        return figures[-1], (int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big"))

    return draw


def panels(figure):
    return {axes.get_xlabel().split(",")[0].split(":")[0]: axes for axes in figure.axes[:4]}


def test_panels_show_the_figures(drawn):
    reports = reports_of(2)
    figure, _ = drawn(reports)
    own = [report["pairs"]["t/testset.save"] for report in reports]
    of = panels(figure)
    points = [line.get_xdata()[0] for line in of["accuracy"].lines if line.get_marker() in "os" and len(line.get_xdata()) == 1]
    assert points == [own[i][name] for i in (0, 1) for name in ("logps/accuracies", "rewards/accuracies")]
    ends = [segment[:, 0].tolist() for bars in of["accuracy"].collections for segment in bars.get_segments()]
    want = [own[i]["intervals"][name] for i in (0, 1) for name in ("logps/accuracies", "rewards/accuracies")]
    np.testing.assert_allclose(ends, want)
    for line, figures in zip(of["sigmoid(|reward margin|)"].lines[1:], own, strict=True):
        bins = [one for one in figures["calibration"]["bins"] if one["pairs"]]
        assert line.get_xydata().tolist() == [[one["confidence"], one["accuracy"]] for one in bins]
    for line, figures in zip(of["chosen answer (pairs)"].lines, own, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), [group["accuracies"]["logps"] for group in figures["lengths"]["groups"]])
    for steps, figures in zip(of["margin"].patches, own, strict=True):
        assert steps.get_data().values.tolist() == figures["margins"]["pairs"]


@pytest.mark.parametrize("case", [{"is_scored": False}, {"n_pairs": 1}, {"files": ("a.save", "b.save"), "n_columns": 9}], ids=str)
def test_no_text_is_cut_off_or_lies_on_another(drawn, case):
    figure, (width, height) = drawn(reports_of(**{"n_columns": 2, **case}))
    renderer = figure.canvas.get_renderer()
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip() and text.get_visible()]
    # The ticks beyond an axis' end are made, but not drawn.
    hidden = {label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in _beyond(axis)}
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text not in hidden]
    assert len(boxes) > 20
    for name, box in boxes:
        assert box.x0 >= 0, name
        assert box.y0 >= 0, name
        assert box.x1 <= figure.bbox.width, name
        assert box.y1 <= figure.bbox.height, name
    for i, (name, box) in enumerate(boxes):
        for other_name, other in boxes[:i]:
            assert not box.overlaps(other), (name, other_name)
    assert (width, height) == (round(figure.bbox.width), pytest.approx(figure.bbox.height, abs=1))


def _beyond(axis):
    low, high = sorted(axis.get_view_interval())
    slack = 1e-9 * (high - low)
    beyond = [tick for tick in axis.get_major_ticks() if not low - slack <= tick.get_loc() <= high + slack]
    return [label for tick in beyond for label in (tick.label1, tick.label2)]


def test_checkpoints_are_told_apart_and_named_as_they_are(drawn):
    figure, _ = drawn(reports_of(7))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["1: a/$x^$_b.pth", "2: _out/rwkv-final.pth"]
    styles = [(line.get_color(), line.get_marker()) for line in legend.get_lines()]
    assert len({colour for colour, _ in styles}) == len({marker for _, marker in styles}) == 7


def test_pairs_without_a_reference_say_why_there_is_no_curve(drawn):
    figure, _ = drawn(reports_of(1, is_scored=False))
    assert [text.get_text() for text in figure.axes[1].texts] == ["without rewards"]
