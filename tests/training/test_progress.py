"""What a run shows while it lasts, and what it says at its end."""

import functools
import io
import json
import re
import shlex
import sys

import pytest
import runs
import torch
from conftest import random_model
from runs import TINY, run_to
from rwkv_dpo.base.progress import Progress
from rwkv_dpo.commands import evaluate, export, train
from rwkv_dpo.data.pair_files import load_pairs
from rwkv_dpo.evaluation.scoring import evaluate_pairs
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.run.callbacks import next_commands
from rwkv_dpo.run.settings import settings_of
from rwkv_dpo.training.progress import best_and_last

flags = functools.partial(runs.flags, dpo_valid_file="DATA/valid.save", epoch_save=0)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def in_terminal(monkeypatch) -> Terminal:
    """pytest sets standard error anew between a fixture and its test."""
    stand_in = Terminal()
    monkeypatch.setattr(sys, "stderr", stand_in)
    return stand_in


def drawn(terminal) -> str:
    """What was drawn since the last call."""
    text = terminal.getvalue()
    terminal.seek(0)
    terminal.truncate()
    return text


def bars(text) -> list[tuple[int, int]]:
    """(step, of so many) of each time the bar was drawn."""
    return [(int(done), int(total)) for done, total in re.findall(r"training: .*?(\d+)/(\d+) \[", text)]


def test_the_bar_counts_the_steps_of_the_whole_run_those_before_a_resumption_included(data, tmp_path, monkeypatch):
    terminal = in_terminal(monkeypatch)
    run_to(3, flags(data, tmp_path, enable_progress_bar=True, log_every_s=0))
    before = drawn(terminal)
    assert bars(before)[-1] == (3, 8)
    assert "training step" not in before
    train.main(flags(data, tmp_path, enable_progress_bar=True))
    text = drawn(terminal)
    assert bars(text)[0] == (3, 8)
    assert bars(text)[-1] == (8, 8)
    last = text.splitlines()[-1]
    assert re.search(r"8/8 \[.*, loss=\d\.\d{4}, accuracy=\d\.\d\d, margin=-?\d\.\d{3}, tok/s=[\d,]+\]", last), last


@pytest.mark.parametrize(("every_s", "told"), [(0, [4, 5, 6, 7, 8]), (1e6, [8])])
def test_elsewhere_lines_tell_of_steps_and_the_last_one_always(data, tmp_path, capsys, every_s, told):
    run_to(3, flags(data, tmp_path, enable_progress_bar=True, log_every_s=every_s))
    capsys.readouterr()
    train.main(flags(data, tmp_path, enable_progress_bar=True, log_every_s=every_s, epoch_save=0))
    text = capsys.readouterr().err
    assert "%|" not in text
    lines = [line for line in text.splitlines() if line.startswith("training step ")]
    assert [int(line.split()[2]) for line in lines] == told
    form = r"training step \d of 8, loss \d\.\d{4}, accuracy \d\.\d\d, margin -?\d\.\d{3}, [\d,]+ tok/s(, \d\d:\d\d left)?"
    assert all(re.fullmatch(form, line) for line in lines), lines
    assert [line.endswith(" left") for line in lines] == [step < 8 for step in told]


def test_a_stopped_run_tells_of_its_last_step(data, tmp_path, capsys):
    run_to(3, flags(data, tmp_path, enable_progress_bar=True))
    assert re.search(r"^training step 3 of 8, .* left$", capsys.readouterr().err, re.MULTILINE)


def test_lines_come_when_their_time_has_come_and_rate_is_of_this_life(capsys):
    now = [0.0]
    with Progress(1100, "pair", "reference", every_s=30, done=100, clock=lambda: now[0]) as progress:
        for seconds in (10, 29, 30, 40, 65):
            now[0] = seconds
            progress.update(100)
        progress.tell()  # told already
    # 300 in 30 seconds and 700 left; 500 in 65 and 500 left.
    assert capsys.readouterr().err == "reference pair 400 of 1,100, 01:10 left\nreference pair 600 of 1,100, 01:05 left\n"


def test_nothing_is_shown_where_nothing_is_wanted(capsys, monkeypatch):
    terminal = in_terminal(monkeypatch)
    with Progress(2, "pair", every_s=0, shows=False) as progress:
        progress.update()
    monkeypatch.undo()
    with Progress(2, "pair", every_s=0, shows=False) as progress:
        progress.update()
    assert terminal.getvalue() == capsys.readouterr().err == ""


def test_without_the_flag_there_is_neither_bar_nor_line(data, tmp_path, capsys):
    train.main(flags(data, tmp_path, epoch_count=1, dpo_ref="recompute", log_every_s=0))
    text = capsys.readouterr().err
    assert "%|" not in text
    assert " of 4" not in text


def test_reference_scoring_tells_lines_too(data, tmp_path, capsys):
    train.main(flags(data, tmp_path, epoch_count=1, dpo_ref="recompute", enable_progress_bar=True, log_every_s=0))
    text = capsys.readouterr().err
    assert re.search(r"^reference pair 20 of 20$", text, re.MULTILINE)
    assert "%|" not in text


def test_the_end_says_time_files_and_held_out_figures(data, tmp_path, caplog):
    caplog.set_level("INFO")
    train.main(flags(data, tmp_path / "out", epoch_count=3))
    said = caplog.messages[-5:]
    assert re.fullmatch(r"steps 1 to 12 in 0:00:\d\d", said[0])
    names = ["rwkv-2.pth", "rwkv-final.pth", "metrics.jsonl", "valid.jsonl"]
    assert said[1] == f"wrote {', '.join(str(tmp_path / 'out' / name) for name in names)}"
    assert said[2] == f"{tmp_path / 'out' / 'report.html'} shows the run"
    assert said[3] == best_and_last(tmp_path / "out" / "valid.jsonl")


@pytest.mark.parametrize("changes", [{}, {"peft": "lora"}, {"peft": "state"}, {"load_model": None, "dpo": 0, "vocab_size": 61, "n_layer": 1,
                                      "n_embd": 32, "head_size_a": 8, "dpo_valid_file": None}], ids=str)  # fmt: skip
def test_the_commands_that_the_end_names_can_be_given(data, tmp_path, caplog, capsys, monkeypatch, changes):
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    train.main(flags(data, "out", epoch_count=1, **changes))
    commands = [shlex.split(message.removeprefix("next: ")) for message in caplog.messages if message.startswith("next: ")]
    assert len(commands) == (2 if changes.get("peft") == "lora" else 1)
    scripts = {"evaluate.py": evaluate, "export.py": export}
    for script, *arguments in commands:
        assert script.endswith(tuple(scripts))
        scripts[script.rsplit("/", 1)[1]].main(arguments)
    assert "corpus perplexity" in capsys.readouterr().out


def test_the_test_set_beside_the_training_pairs_is_what_is_compared_on(tmp_path):
    given = {"load_model": "base.pth", "dpo_train_file": str(tmp_path / "trainset.save"), "dpo_valid_file": "valid.save"}
    settings = settings_of({**given, "proj_dir": str(tmp_path)})
    assert "--pairs valid.save" in next_commands(settings)[0]
    (tmp_path / "testset.save").write_bytes(b"")
    (command,) = next_commands(settings)
    assert command.endswith(f"evaluate.py --load_model base.pth {tmp_path}/rwkv-final.pth --pairs {tmp_path}/testset.save")


def test_best_is_the_step_of_the_lowest_loss_and_a_loss_that_is_no_number_is_none(tmp_path):
    def write(*losses):
        figures = [{"step": e, "loss_dpo": loss, "rewards/accuracies": 0.5, "rewards/margins": 0.25} for e, loss in enumerate(losses)]
        (tmp_path / "valid.jsonl").write_text("".join(json.dumps(record) + "\n" for record in figures))
        return best_and_last(tmp_path / "valid.jsonl")

    assert best_and_last(tmp_path / "valid.jsonl") == ""
    rest = "accuracy 0.500, margin 0.2500"
    assert write(0.7, 0.6, 0.65, None) == (
        f"held-out pairs: best after step 1: DPO loss 0.6000, {rest}; after step 2, the last: DPO loss 0.6500, {rest}"
    )
    assert write(0.7, 0.6) == f"held-out pairs: best after step 1, the last: DPO loss 0.6000, {rest}"


def test_evaluate_shows_how_far_it_is_in_a_terminal_alone(data, monkeypatch, capsys):
    arguments = ["--load_model", str(data / "model.pth"), "--pairs", str(data / "train.save"), "--data_file", str(data / "corpus.bin"),
                 "--data_type", "uint16", "--ctx_len", "100", "--device", "cpu", "--wkv_backend", "chunked"]  # fmt: skip
    terminal = Terminal()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", terminal)
        evaluate.main(arguments)
    assert re.search(r"model.pth: .* 0/10 .*model.pth: .* 0/39 ", terminal.getvalue())
    capsys.readouterr()
    evaluate.main(arguments)
    assert "%|" not in capsys.readouterr().err


def test_evaluating_tells_of_every_pair(data):
    pairs, seen = load_pairs(data / "train.save"), []
    evaluate_pairs(random_model(TINY, torch.float32), pairs, dpo(0.1), 20, seen.append)
    assert sum(seen) == len(pairs) == 10
    assert len(seen) > 1
