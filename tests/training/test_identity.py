"""A run is its flags, its data and its base weights: every check that asks "is this mine?" sees a change of any of them."""

import functools
import json
import shutil

import numpy as np
import pytest
import runs
import torch
from lives import records
from runs import TINY, run_to, write_inputs
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import train
from rwkv_dpo.data.corpus import Corpus, corpus_sha256
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.data.pairs import PairSet, pack_pairs
from rwkv_dpo.run.data import RunData
from rwkv_dpo.run.settings import FLAGS, settings_of
from rwkv_dpo.run.start import identity_of
from rwkv_dpo.run_folder.identity import Identity
from rwkv_dpo.settings.fields import Part

flags = functools.partial(runs.flags, epoch_steps=6, epoch_count=1)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_inputs(folder, TINY, 12)
    return folder


def exchanged(pairs: PairSet) -> PairSet:
    """Chosen and rejected in each other's place: as many pairs, as many tokens."""
    rows = [pairs.pair(i) for i in range(len(pairs))]
    return pack_pairs([(p, r, c) for p, c, r in rows], pairs.ref_logps[:, ::-1], pairs.header)


def other_pairs(data):
    save_pairs(data / "train.save", exchanged(load_pairs(data / "train.save")))


def other_scores(data):
    pairs = load_pairs(data / "train.save")
    pairs.ref_logps[:, 0] += 0.5
    save_pairs(data / "train.save", pairs)


def other_corpus(data):
    """As many tokens."""
    np.fromfile(data / "corpus.bin", "<u2")[::-1].tofile(data / "corpus.bin")


def other_base(data):
    weights = torch.load(data / "model.pth", weights_only=True)
    weights["head.weight"][0, 0] += 0.5
    torch.save(weights, data / "model.pth")


CHANGES = [(other_pairs, "dpo_train_file"), (other_scores, "dpo_train_file"), (other_corpus, "data_file"), (other_base, "load_model")]


@pytest.mark.parametrize(("change", "flag"), CHANGES)
def test_a_finished_run_on_other_content_under_the_same_names_is_not_this_one(data, tmp_path, change, flag):
    out = tmp_path / "out"
    train.main(flags(data, out))
    before = (out / "rwkv-final.pth").read_bytes()
    change(data)
    with pytest.raises(InputError, match=rf"holds a run with other settings: --{flag} \S+ \(its content has changed\); --overwrite 1"):
        train.main(flags(data, out))
    train.main(flags(data, out, overwrite=1))
    assert (out / "rwkv-final.pth").read_bytes() != before
    assert (out / "earlier-1" / "rwkv-final.pth").read_bytes() == before


@pytest.mark.parametrize(("change", "flag"), CHANGES)
@pytest.mark.parametrize("peft", ["none", "lora"])
def test_an_interrupted_run_does_not_go_on_with_other_content(data, tmp_path, change, flag, peft):
    tuned = {"peft": peft, "lora_r": 2} if peft == "lora" else {}
    run_to(2, flags(data, tmp_path / "out", **tuned))
    change(data)
    with pytest.raises(InputError, match=rf"last/step-\d+\.pth is of a run with other settings: --{flag} \S+ \(its content has changed\)"):
        train.main(flags(data, tmp_path / "out", **tuned))


def test_the_same_files_under_other_paths_are_the_same_run(data, tmp_path, caplog):
    train.main(flags(data, tmp_path / "out"))
    moved = tmp_path / "moved"
    shutil.copytree(data, moved)
    with caplog.at_level("INFO"):
        train.main(flags(moved, tmp_path / "out"))
    assert "holds the end of this run" in caplog.text


def test_what_a_run_writes_says_whose_it_is(data, tmp_path):
    out = tmp_path / "out"
    train.main(flags(data, out))
    config, end = (json.loads((out / name).read_text()) for name in ("config.json", "rwkv-final.json"))
    assert end.pop("step") == 6
    assert end.pop("sha256") == (out / "rwkv-final.pth.sha256").read_text().split()[0]
    assert end == config
    assert config["content"]["load_model"] == (data / "model.pth.sha256").read_text().split()[0]


def test_a_run_begun_anew_and_killed_is_not_taken_for_the_finished_one_before_it(data, tmp_path, lives):
    """--resume none, killed before its first save: the same command trains, and the first run's weights are where they were set aside."""
    out, log = tmp_path / "out", tmp_path / "log.txt"
    train.main(flags(data, out))
    finished = (out / "rwkv-final.pth").read_bytes()
    (process,) = lives.start(flags(data, out, resume="none", epoch_steps=6), log)
    while not (out / "earlier-1" / "rwkv-final.pth").exists():
        assert process.is_alive(), log.read_text()
    process.kill()
    process.join()
    assert not (out / "rwkv-final.json").exists()
    train.main(flags(data, out))
    assert [r["step"] for r in records(out)] == list(range(1, 7))
    assert (out / "rwkv-final.pth").read_bytes() == (out / "earlier-1" / "rwkv-final.pth").read_bytes() == finished


def test_weights_that_were_put_in_the_place_of_the_final_ones_are_not_the_end_of_the_run(data, tmp_path, caplog):
    out = tmp_path / "out"
    train.main(flags(data, out))
    (out / "rwkv-final.pth.sha256").write_text("0" * 64 + "  rwkv-final.pth\n")
    with caplog.at_level("INFO"):
        train.main(flags(data, out))
    assert "holds the end of this run" not in caplog.text
    assert (out / "earlier-1" / "rwkv-final.json").exists()


def test_everything_that_an_earlier_run_wrote_is_set_aside_together(data, tmp_path):
    out = tmp_path / "out"
    tuned = {"peft": "lora", "lora_r": 2, "dpo_ref": "recompute", "dpo_valid_file": data / "valid.save"}
    train.main(flags(data, out, **tuned))
    before = {path.name for path in out.iterdir()}
    assert {"adapter-init", "adapter-0", "adapter-final", "adapter-final.json", "reference.save", "valid.jsonl", "config.json"} < before
    (out / "notes.txt").write_text("mine")
    train.main(flags(data, out, overwrite=1))
    assert {path.name for path in (out / "earlier-1").iterdir()} == before
    assert not list(out.glob("adapter-*"))
    assert (out / "notes.txt").exists()


def test_a_file_of_the_run_folder_that_the_run_starts_from_is_not_moved_or_written_over(data, tmp_path):
    out = tmp_path / "out"
    train.main(flags(data, out))
    with pytest.raises(InputError, match=r"rwkv-final\.pth: this run starts from it and would overwrite it; name another --proj_dir"):
        train.main(flags(data, out, load_model=out / "rwkv-final.pth", overwrite=1))
    assert (out / "rwkv-final.pth").exists()
    new = {"load_model": None, "vocab_size": 61, "n_layer": 1, "n_embd": 32, "head_size_a": 32, "dpo": 0}
    train.main(flags(data, tmp_path / "new", **new))
    init = (tmp_path / "new" / "rwkv-init.pth").read_bytes()
    train.main(flags(data, tmp_path / "new", load_model=tmp_path / "new" / "rwkv-init.pth", dpo=0, overwrite=1))
    assert (tmp_path / "new" / "rwkv-init.pth").read_bytes() == init


def test_every_file_that_a_flag_names_is_known_by_its_content():
    content = identity_of(settings_of({}), RunData()).content
    assert {name for name, flag in FLAGS.items() if flag.names_file} == content.keys() - {"source_id", "preparation_id"}


def test_folders_of_earlier_versions_are_compared_by_their_flags_and_paths():
    now = identity_of(settings_of({"dpo_beta": 0.1, "dpo_train_file": "a.save", "dpo_general_corpus_ratio": 1}), RunData())
    before = Identity.from_json(settings_of({"dpo_beta": 0.2, "dpo_train_file": "b.save"}).as_flags())
    assert now.changes_from(before, ()) == [
        "--dpo_train_file a.save (was b.save)", "--dpo_beta 0.1 (was 0.2)", "--dpo_general_corpus_ratio 1 (was 0.0)",
    ]  # fmt: skip
    del before.flags["dpo_beta"]  # of a version that had no such flag
    assert len(now.changes_from(before, (), free_flags=("dpo_train_file",))) == 1
    assert len(now.changes_from(before, {Part.RESULT})) == 0


def test_a_corpus_is_known_by_its_tokens_whatever_holds_them(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 100, 1000)

    def sha(tokens, characters=""):
        return corpus_sha256(Corpus("c", tokens, 100, characters))

    assert sha(tokens.astype("<u2")) == sha(tokens.astype(">i4"))
    assert sha(tokens) != sha(tokens, "abc")
    for i in (0, 500, 999):
        changed = tokens.copy()
        changed[i] += 1
        assert sha(changed) != sha(tokens)
    # A larger one is sampled: 4 blocks of 10, the last token among them.
    monkeypatch.setattr("rwkv_dpo.data.corpus._SAMPLED", 4)
    monkeypatch.setattr("rwkv_dpo.data.corpus._SAMPLED_BLOCK", 10)
    assert sha(tokens) != sha(tokens[:-1])
    assert sha(np.delete(tokens, 300)) != sha(np.delete(tokens, 700))
    changed = tokens.copy()
    changed[-1] += 1
    assert sha(changed) != sha(tokens)
