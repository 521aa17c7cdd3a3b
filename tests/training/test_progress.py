"""What a run shows while it lasts, and what it says at its end."""

import functools
import io
import json
import re
import shlex
import sys

import evaluate
import export
import pytest
import runs
import torch
import train
from conftest import random_model
from runs import TINY, run_to
from rwkv_dpo.data.pair_files import load_pairs
from rwkv_dpo.evaluation.scoring import evaluate_pairs
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.run.callbacks import next_commands
from rwkv_dpo.run.settings import settings_of
from rwkv_dpo.training.progress import best_and_last

flags = functools.partial(runs.flags, dpo_valid_file="DATA/valid.save", epoch_save=0)


def bars(text) -> list[tuple[int, int]]:
    """(step, of so many) of each time the bar was drawn."""
    return [(int(done), int(total)) for done, total in re.findall(r"training: .*?(\d+)/(\d+) \[", text)]


def test_the_bar_counts_the_steps_of_the_whole_run_those_before_a_resumption_included(data, tmp_path, capsys):
    run_to(3, flags(data, tmp_path, enable_progress_bar=True))
    assert bars(capsys.readouterr().err)[-1] == (3, 8)
    train.main(flags(data, tmp_path, enable_progress_bar=True))
    drawn = capsys.readouterr().err
    assert bars(drawn)[0] == (3, 8)
    assert bars(drawn)[-1] == (8, 8)
    last = drawn.splitlines()[-1]
    assert re.search(r"8/8 \[.*, loss=\d\.\d{4}, accuracy=\d\.\d\d, margin=-?\d\.\d{3}, tok/s=[\d,]+\]", last), last


def test_without_the_flag_there_is_no_bar(data, tmp_path, capsys):
    train.main(flags(data, tmp_path, epoch_count=1, dpo_ref="recompute"))
    assert "%|" not in capsys.readouterr().err


def test_the_end_says_time_files_and_held_out_figures(data, tmp_path, caplog):
    caplog.set_level("INFO")
    train.main(flags(data, tmp_path / "out", epoch_count=3))
    said = caplog.messages[-4:]
    assert re.fullmatch(r"steps 1 to 12 in 0:00:\d\d", said[0])
    names = ["rwkv-2.pth", "rwkv-final.pth", "metrics.jsonl", "valid.jsonl"]
    assert said[1] == f"wrote {', '.join(str(tmp_path / 'out' / name) for name in names)}"
    assert said[2] == best_and_last(tmp_path / "out" / "valid.jsonl")


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


class Terminal(io.StringIO):
    def isatty(self):
        return True


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
