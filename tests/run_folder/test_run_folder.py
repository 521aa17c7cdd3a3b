"""The logs of a run folder, as a checkpoint takes note of them."""

import runs
from recording_os import RecordingOS
from rwkv_dpo.commands import train
from rwkv_dpo.run_folder.contents import cut_logs, log_sizes


def test_logs_are_on_the_disk_up_to_the_sizes_that_a_checkpoint_notes(tmp_path, monkeypatch):
    """Else a power cut could leave a checkpoint that counts on lines which are gone."""
    stand_in = RecordingOS()
    monkeypatch.setattr("rwkv_dpo.run_folder.contents.os", stand_in)
    sizes = {"metrics.jsonl": 3, "train_log.txt": 5}
    for name, size in sizes.items():
        (tmp_path / name).write_text("x" * size)
    assert log_sizes(tmp_path) == sizes
    assert stand_in.record == [("fsync", (tmp_path / name).stat().st_ino, size) for name, size in sizes.items()]


def test_what_later_steps_logged_is_cut_off(tmp_path):
    for name in ("metrics.jsonl", "valid.jsonl"):
        (tmp_path / name).write_text("1\n2\n3\n")
    cut_logs(tmp_path, {"metrics.jsonl": 4})
    assert (tmp_path / "metrics.jsonl").read_text() == "1\n2\n"
    assert (tmp_path / "valid.jsonl").read_text() == ""


def test_the_start_of_a_run_removes_what_killed_processes_left(data, tmp_path):
    """Of files and folders that this run doesn't write, too: they would stay for ever."""
    for name in ("last", "adapter-1", ".adapter-0.7.part", ".adapter-1.7.old"):
        (tmp_path / name).mkdir()
    for name in (".adapter-0.7.part/half", ".rwkv-7.pth.0123456789abcdef.part", "last/.step-3.pth.0123456789abcdef.part"):
        (tmp_path / name).write_text("half")
    train.main(runs.flags(data, tmp_path, epoch_steps=1, epoch_count=1))
    assert not [path.name for path in tmp_path.rglob(".*")]
