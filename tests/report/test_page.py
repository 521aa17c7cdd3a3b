"""The page of the report: of what the files hold, and harmless whatever the data says."""

import json

import numpy as np
import pytest
from html_reader import Reader
from rwkv_dpo.data.preference import Notes, Preference
from rwkv_dpo.data.prepare import prepare
from rwkv_dpo.data.splits import identified, split_rows, write_splits
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.report.look import look, whole_report
from rwkv_dpo.report.page import as_page, outline

HOSTILE = "<script>alert(1)</script>"


def preferences():
    for i in range(14):
        scores = (4.0 + i % 3, 2.0) if i % 2 else None
        yield Preference(f"row {i}", "", (f"Question {i} {HOSTILE}?",), f"Answer {i}." + " Good." * (i % 4), "No." * (1 + i % 3), scores)


@pytest.fixture
def made(tmp_path):
    """The page and report.json of a preparation whose reference was drawn."""
    (tmp_path / "model.pth").write_bytes(b"weights")
    tokenizer = WorldTokenizer()
    prepared = prepare(preferences(), tokenizer, 64, "chat", 0).grown(256)
    rows = split_rows(prepared.prompt_keys, 0.3, 0.2, 0)
    pairs = identified(prepared.pairs, rows, tmp_path / "model.pth", "fp32")
    scored = pairs.with_ref_logps(-np.random.default_rng(0).random((len(pairs), 2)), pairs.header["reference_sha256"], "fp32")
    report = whole_report(look(prepared, rows, tokenizer, 64, 0), prepared, Notes(), {}, scored)
    write_splits(tmp_path, scored, rows, report, as_page)
    return (tmp_path / "report.html").read_text(), json.loads((tmp_path / "report.json").read_text())


def test_the_page_shows_the_report_and_ten_samples(made):
    page, report = made
    seen = Reader(page)
    assert len(report["samples"]) == 10
    for sample in report["samples"]:
        for part in ("prompt", "chosen", "rejected"):
            assert sample[part]["text"] in seen.text
            assert f"{part}, {sample[part]['tokens']} tokens" in seen.text
    ranked_right = f"{100 * report['reference']['ranked_right']:.1f} %"
    for text in (report["pairs"]["preparation_id"], "trainset.save", "mostly in", "Latin", ranked_right):
        assert text in seen.text
    assert sum(tag == "polyline" for tag, _ in seen.tags) == 4


def test_nothing_of_the_data_becomes_markup_and_nothing_is_fetched(made):
    page, _ = made
    seen = Reader(page)
    assert HOSTILE in seen.text
    assert {tag for tag, _ in seen.tags}.isdisjoint({"script", "link", "img", "iframe"})
    assert not any(name in ("href", "src") or name.startswith("on") for _, attrs in seen.tags for name in attrs)
    assert "http" not in page


def test_the_same_report_makes_the_same_page(made):
    page, report = made
    assert as_page(report) == page


def test_the_outline_of_bars_by_hand():
    assert outline([0, 2], 2) == "0,160 0.0,160.0 320.0,160.0 320.0,0.0 640.0,0.0 640,160"
