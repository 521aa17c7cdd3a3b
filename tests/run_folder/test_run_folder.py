"""The logs of a run folder, as a checkpoint takes note of them."""

from recording_os import RecordingOS
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
