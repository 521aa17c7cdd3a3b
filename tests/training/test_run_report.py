"""report.html and curves.png of real runs: there whatever the run has, whole after a resumption, and never worth a run."""

import functools
import json
import re
import sys

import pytest
import runs
from runs import run_to
from rwkv_dpo.commands import train
from rwkv_dpo.report.run_page import About
from rwkv_dpo.training import run_report
from rwkv_dpo.training.run_report import RunFiles

flags = functools.partial(runs.flags, dpo_valid_file="DATA/valid.save", epoch_save=0)
PNG = b"\x89PNG\r\n\x1a\n"
LANGUAGE_MODEL = {"load_model": None, "dpo": 0, "vocab_size": 61, "n_layer": 1, "n_embd": 32, "head_size_a": 8, "dpo_valid_file": None}


def page(folder) -> str:
    return (folder / "report.html").read_text()


def titles(folder) -> set[str]:
    return set(re.findall(r"<figcaption><b>(.*?)</b>", page(folder)))


@pytest.mark.parametrize(("changes", "there", "missing"), [
    ({}, {"Loss", "Preference loss", "Corpus loss", "Accuracy", "Margin", "Change of log-probabilities", "Length"}, set()),
    ({"dpo_valid_file": None, "dpo_general_corpus_ratio": 0}, {"Preference loss", "Accuracy"}, {"Corpus loss", "Loss", "Length"}),
    (LANGUAGE_MODEL, {"Corpus loss", "Throughput", "Peak memory"}, {"Preference loss", "Accuracy", "Loss"}),
], ids=["pairs, corpus and held-out pairs", "pairs alone", "a corpus alone"])  # fmt: skip
def test_a_run_ends_with_its_page_and_picture(data, tmp_path, caplog, changes, there, missing):
    train.main(flags(data, tmp_path / "out", **changes))
    shown = titles(tmp_path / "out")
    assert there <= shown
    assert not missing & shown
    assert re.search(r"step 8 of 8, finished; written \d{4}-\d\d-\d\d \d\d:\d\d<", page(tmp_path / "out"))
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(PNG)
    assert ("10, of " in page(tmp_path / "out")) == (changes is not LANGUAGE_MODEL)
    assert ("4,000 tokens, of " in page(tmp_path / "out")) == ("Corpus loss" in there)
    assert "without report.html" not in caplog.text


def test_the_page_is_written_at_the_start_at_evaluations_at_ends_of_epochs_and_of_the_run(data, tmp_path, monkeypatch):
    seen, write = [], run_report._write

    def noting(path, content):
        write(path, content)
        if path.name == "report.html":
            seen.append(re.search(r"step (\d of \d), ([a-z]+)", content.decode()).groups())

    monkeypatch.setattr(run_report, "_write", noting)
    train.main(flags(data, tmp_path / "out", eval_every=3))
    running = [(f"{step} of 8", "running") for step in (0, 3, 4, 6, 8)]
    assert seen == [*running, ("8 of 8", "finished")]


def test_a_resumed_run_shows_all_of_its_steps(data, tmp_path):
    train.main(flags(data, tmp_path / "whole", eval_every=2))
    run_to(3, flags(data, tmp_path / "out", eval_every=2))
    assert "step 3 of 8, stopped after step 3 of 8; the same command continues" in page(tmp_path / "out")
    train.main(flags(data, tmp_path / "out", eval_every=2))

    def curves(folder):
        figures = re.findall(r"<figcaption><b>(.*?)</b>.*?</figure>", page(folder), re.DOTALL)
        drawn = re.findall(r"<figure>.*?</figure>", page(folder), re.DOTALL)
        return {name: one for name, one in zip(figures, drawn, strict=True) if name not in ("Throughput", "Peak memory")}

    assert curves(tmp_path / "out") == curves(tmp_path / "whole")


def test_a_run_that_begins_anew_sets_the_page_of_the_one_before_aside(data, tmp_path):
    train.main(flags(data, tmp_path / "out", epoch_count=1))
    before = page(tmp_path / "out")
    train.main(flags(data, tmp_path / "out", epoch_count=1, resume="none"))
    assert page(tmp_path / "out" / "earlier-1") == before
    assert (tmp_path / "out" / "earlier-1" / "curves.png").exists()


def test_what_cannot_be_written_is_told_of_once_and_ends_no_run(data, tmp_path, caplog):
    run_to(3, flags(data, tmp_path / "out"))
    (tmp_path / "out" / "report.html").unlink()
    # A folder of that name is in the way.
    (tmp_path / "out" / "report.html").mkdir()
    train.main(flags(data, tmp_path / "out"))
    assert (tmp_path / "out" / "rwkv-final.pth").exists()
    (told,) = [message for message in caplog.messages if "continues without report.html" in message]
    assert "report.html: cannot be written: Is a directory" in told


def test_without_matplotlib_there_is_a_page_and_one_line(data, tmp_path, monkeypatch, caplog):
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train.main(flags(data, tmp_path / "out"))
    assert "finished" in page(tmp_path / "out")
    assert not (tmp_path / "out" / "curves.png").exists()
    assert [message for message in caplog.messages if "matplotlib" in message] == [
        "curves.png is not drawn: the package matplotlib is missing"
    ]


def test_a_failure_that_shows_is_warned_of_once_and_stands_on_the_page(data, tmp_path, caplog):
    """Ten pairs, a high beta and a high rate: after a few passes every margin is out of reach."""
    changes = {"lr_init": 0.01, "lr_final": 0.01, "epoch_steps": 30, "dpo_general_corpus_ratio": 0, "dpo_beta": 1}
    train.main(flags(data, tmp_path / "out", eval_every=10, **changes))
    warned = [message for message in caplog.messages if message.startswith("the margins of training pairs are ")]
    assert len(warned) == 1
    assert "--epoch_count" in warned[0]
    assert "Look at this:</b> the margins of training pairs are " in page(tmp_path / "out")


def test_logs_are_read_as_they_grow_torn_and_foreign_lines_aside(tmp_path):
    files = RunFiles(tmp_path)
    files.read()
    assert len(files.train) == 0
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 1, "loss": 0.5}\nnot JSON\n[1]\n{"loss": 1}\n{"step": 2, "lo')
        log.flush()
        files.read()
        assert files.train["loss"].tolist() == [0.5]
        log.write('ss": 0.25}\n')
    files.read()
    assert files.train["loss"].tolist() == [0.5, 0.25]


def test_the_samples_of_the_last_evaluation_are_shown(tmp_path):
    samples = [{"prompt": "p", "base": "b", "now": "n"}, {"now": "x"}, 3]
    lines = [{"step": 0, "samples": [{"prompt": "old"}]}, {"step": 9, "samples": samples}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = RunFiles(tmp_path)
    files.read()
    about = files.about(About("run", "", 9), {}, "running")
    assert (about.samples_step, about.samples) == (9, [{"prompt": "p", "base": "b", "now": "n"}])
    (tmp_path / "samples.jsonl").write_text('{"samples": "none"}\n')
    files = RunFiles(tmp_path)
    files.read()
    assert files.about(About("run", "", 9), {}, "running").samples == []
