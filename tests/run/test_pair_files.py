"""What a run makes of the pair files that it is given, before its first step."""

from dataclasses import replace

import numpy as np
import pytest
import runs
import torch
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.data.pairs import pack_pairs


def run(data, proj_dir, **changes):
    train.main(runs.flags(data, proj_dir, **changes))


def test_pair_files_that_hold_nothing_are_refused_at_the_start(data, tmp_path):
    save_pairs(tmp_path / "none.save", pack_pairs([]))
    torch.save([], tmp_path / "none-original.save")
    for name in ("none.save", "none-original.save"):
        for flag in ("dpo_train_file", "dpo_valid_file"):
            with pytest.raises(InputError, match=rf"^--{flag} .*{name}: holds no pairs$"):
                run(data, tmp_path / "out", **{flag: tmp_path / name})
        with pytest.raises(InputError, match=rf"^--dpo_train_file .*{name}: holds no pairs$"):
            run(data, tmp_path / "out", dpo_train_file=tmp_path / name, dry_run=1)
    assert not (tmp_path / "out").exists()


def test_what_is_no_pair_file_is_told_by_its_flag_and_what_takes_it(data, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{}')
    told = {"rows.jsonl": "not a pair file but JSON lines; preferences become pairs by prepare_pairs.py", "none": "no such pair file"}
    for name, message in told.items():
        for flag in ("dpo_train_file", "dpo_valid_file"):
            with pytest.raises(InputError, match=rf"^--{flag} {tmp_path / name}: {message}"):
                run(data, tmp_path / "out", **{flag: tmp_path / name})


def test_held_out_pairs_that_are_trained_on_are_refused_and_shared_prompts_are_told(data, tmp_path, caplog):
    with pytest.raises(InputError, match=r"^--dpo_valid_file .*train.save: all of its 10 pairs are in --dpo_train_file .*train.save too"):
        run(data, tmp_path / "out", dpo_valid_file=data / "train.save")
    train_pairs, valid_pairs = load_pairs(data / "train.save"), load_pairs(data / "valid.save")
    rows = [valid_pairs.pair(0), train_pairs.pair(3), (train_pairs.pair(4)[0], *valid_pairs.pair(0)[1:])]
    mixed = pack_pairs(rows, np.full((3, 2), -1.0))
    save_pairs(tmp_path / "mixed.save", mixed)
    run(data, tmp_path / "out", dpo_valid_file=tmp_path / "mixed.save", epoch_count=1, epoch_steps=1)
    (line,) = (message for message in caplog.messages if "held out" in message)
    assert line.endswith(f"of its 3 pairs 2 have a prompt that is in --dpo_train_file {data / 'train.save'} too, and 1 the answers as well")
    ids = [{"source_id": "s", "preparation_id": letter * 64} for letter in "ab"]
    save_pairs(tmp_path / "a.save", replace(train_pairs, header=ids[0]))
    save_pairs(tmp_path / "b.save", replace(valid_pairs, header=ids[1]))
    with pytest.raises(InputError, match=r"--dpo_valid_file .*b.save and --dpo_train_file .*a.save are from two preparations"):
        run(data, tmp_path / "out2", dpo_train_file=tmp_path / "a.save", dpo_valid_file=tmp_path / "b.save")


def test_fewer_pairs_than_a_micro_batch_holds_are_told(data, tmp_path, caplog):
    for micro_bsz, n_lines in ((10, 0), (11, 1)):
        caplog.clear()
        run(data, tmp_path / f"out{micro_bsz}", micro_bsz=micro_bsz, epoch_count=1, epoch_steps=1)
        lines = [message for message in caplog.messages if "--micro_bsz" in message]
        assert len(lines) == n_lines
    assert lines[0].startswith("--micro_bsz 11: a micro-batch has more pairs than the 10 of ")
