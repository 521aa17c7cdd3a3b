"""--tensorboard with the real package, read back by its own reader; and the names that all trackers share."""

import functools
import json

import pytest
import runs
from runs import run_to
from rwkv_dpo.commands import train
from rwkv_dpo.training.trackers import tracked

flags = functools.partial(runs.flags, tensorboard=1, dpo_valid_file="DATA/valid.save", epoch_save=0, eval_every=2)


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_logged(folder):
    found = scalars(folder)
    for name in ("loss", "loss_general", "rewards/margins", "logps/chosen", "lr", "grad_norm"):
        wanted = [(record["step"], record[name]) for record in lines(folder / "metrics.jsonl")]
        assert [step for step, _ in found[name]] == [step for step, _ in wanted]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in wanted], rel=1e-6)
    names = {"eval_loss": "loss_dpo", "eval_rewards/accuracies": "rewards/accuracies", "eval_logps/rejected": "logps/rejected"}
    for name, ours in names.items():
        wanted = [(record["step"], record[ours]) for record in lines(folder / "valid.jsonl")]
        assert [step for step, _ in found[name]] == [step for step, _ in wanted]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in wanted], rel=1e-6)
    bands = [record["rewards/accuracies_95"][1] for record in lines(folder / "valid.jsonl")]
    assert [value for _, value in found["eval_rewards/accuracies_95/high"]] == pytest.approx(bands)
    assert "step" not in found


def test_steps_and_evaluations_are_logged_and_a_continued_run_goes_on(data, tmp_path):
    train.main(flags(data, tmp_path / "out", epoch_count=1))
    assert_logged(tmp_path / "out")
    train.main(flags(data, tmp_path / "out", load_model=tmp_path / "out" / "rwkv-final.pth", epoch_begin=1, epoch_count=1))
    assert [step for step, _ in scalars(tmp_path / "out")["loss"]] == list(range(1, 9))
    assert_logged(tmp_path / "out")


def test_steps_that_a_resumed_run_does_again_are_there_once(data, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    run_to(3, flags(data, tmp_path / "out"))
    # What a kill leaves: steps after the last checkpoint.
    with SummaryWriter(str(tmp_path / "out" / "tensorboard")) as writer:
        for step in (4, 5, 6):
            writer.add_scalar("loss", 99.0, step)
    train.main(flags(data, tmp_path / "out"))
    assert_logged(tmp_path / "out")


def test_event_files_that_cannot_be_written_are_told_of_and_end_no_run(data, tmp_path, caplog):
    run_to(3, flags(data, tmp_path / "out", tensorboard=0))
    (tmp_path / "out" / "tensorboard").write_text("a file is in the way")
    train.main(flags(data, tmp_path / "out"))
    assert (tmp_path / "out" / "rwkv-final.pth").exists()
    assert len([message for message in caplog.messages if message.endswith("; the run continues without it")]) == 1


def test_names_are_trls():
    record = {"step": 4, "epoch": 1, "loss_dpo": 0.5, "logps/chosen": -3.0, "corpus_loss": None, "rewards/accuracies_95": [0.25, 0.75]}
    assert tracked(record, is_held_out=True) == {
        "step": 4, "epoch": 1, "eval_loss": 0.5, "eval_logps/chosen": -3.0, "eval_rewards/accuracies_95/low": 0.25,
        "eval_rewards/accuracies_95/high": 0.75,
    }  # fmt: skip
    assert tracked({"step": 4, "loss": 0.5, "grad_norm": None}) == {"step": 4, "loss": 0.5}
