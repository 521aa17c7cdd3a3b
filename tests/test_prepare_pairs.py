"""prepare_pairs.py, run as users run it, with a tiny model as the reference."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import prepare_pairs as script
from rwkv_dpo.data.pair_files import load_pairs
from rwkv_dpo.data.tokenizer import VOCAB_SIZE, WorldTokenizer
from rwkv_dpo.files.hashed import file_sha256

SCRIPT = Path(__file__).resolve().parents[1] / "RWKV-v5" / "prepare_pairs.py"


@pytest.fixture
def prepare_pairs(lives):
    return lambda folder, *arguments: lives.script(SCRIPT, arguments, folder)


@pytest.fixture
def source(tmp_path):
    rows = [{"prompt": f"Question {i}?", "chosen": f"Answer {i}.", "rejected": "No. " * (1 + i % 3)} for i in range(40)]
    rows[7]["chosen"] = " "
    rows[9] = rows[8]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def save_tiny_model(path, vocab_size=VOCAB_SIZE):
    pytest.importorskip("rwkv_dpo.objective.objective")
    from rwkv_dpo.kernels.wkv5.reference import wkv5
    from rwkv_dpo.model.checkpoint import empty_model, save_weights
    from rwkv_dpo.model.init import init_weights
    from rwkv_dpo.model.shape import ModelShape

    shape = ModelShape(n_layer=1, n_embd=16, dim_att=16, dim_ffn=32, vocab_size=vocab_size, head_size=8)
    model = empty_model(shape, wkv5, torch.float32)
    init_weights(model, lr_init=1e-2, seed=0)
    save_weights(dict(model.named_parameters()), path)
    return path


def load_splits(folder):
    return [load_pairs(folder / f"{name}set.save", VOCAB_SIZE) for name in ("train", "valid", "test")]


def test_the_form_of_g1_models_warns_of_a_checkpoint_of_another_version(prepare_pairs, source):
    model = save_tiny_model(source.parent / "tiny.pth")
    common = ("--source", source, "--load_model", model, "--device", "cpu", "--wkv_backend", "reference", "--out_dir", "out")
    run = prepare_pairs(source.parent, *common, "--templates", "g1-think")
    assert run.returncode == 0, run.stderr
    assert f"writes as RWKV-7 G1 models were trained; {model} is an RWKV-5 checkpoint" in run.stderr
    prompt, chosen, _ = load_splits(source.parent / "out")[0].pair(0)
    assert WorldTokenizer().decode(prompt.tolist()).endswith("Assistant: <think>\n</think")
    assert WorldTokenizer().decode(chosen.tolist()).startswith(">\nAnswer")


def test_splits_and_report_tell_what_was_done(prepare_pairs, source):
    folder = source.parent
    model = save_tiny_model(folder / "tiny.pth")
    common = ("--source", source, "--load_model", model, "--device", "cpu", "--wkv_backend", "reference", "--ctx_len", 64)
    run = prepare_pairs(folder, *common, "--out_dir", "out", "--valid_ratio", 0.3)
    assert run.returncode == 0, run.stderr
    told = [line.split() for line in run.stdout.splitlines()]
    assert told[:2] == [["row", "8:", "dropped:", "empty", "answer"], ["row", "10:", "dropped:", "duplicate"]]
    for line in ("rows read 40", "kept 38", "dropped 2", "duplicate 1"):
        assert line.split() in told

    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["pairs"]["counts"]["dropped"] == {"empty answer": 1, "duplicate": 1}
    assert report["dropped_rows"] == {"empty answer": ["row 8"], "duplicate": ["row 10"]}
    assert report["lengths"]["prompt"]["max"] == max(
        len(pairs.pair(i)[0]) for pairs in load_splits(folder / "out") for i in range(len(pairs))
    )
    assert report["pairs"]["reference_sha256"] == file_sha256(model)
    sets = load_splits(folder / "out")
    logps = np.concatenate([pairs.ref_logps for pairs in sets])
    assert report["reference"]["chosen"]["mean"] == pytest.approx(logps[:, 0].mean())
    assert report["reference"]["ranked_right"] == pytest.approx(np.mean(logps[:, 0] > logps[:, 1]))
    assert sum(map(len, sets)) == 38
    assert all(len(pairs) > 0 for pairs in sets)
    for pairs, name in zip(sets, ("train", "valid", "test"), strict=True):
        path = folder / "out" / f"{name}set.save"
        assert [path.name, str(len(pairs)), "pairs", "sha256", file_sha256(path)] in told
        assert report["files"][path.name] == {"pairs": len(pairs), "sha256": file_sha256(path)}
        assert pairs.header["reference_sha256"] == file_sha256(model)
        assert pairs.is_scored
    # A freshly made head is nearly uniform: a token costs about log(65,536) nats. 5% allows for what the head makes of noise.
    prompt, chosen, _ = sets[0].pair(0)
    assert sets[0].ref_logps[0, 0] == pytest.approx(-len(chosen) * np.log(VOCAB_SIZE), rel=0.05)
    assert WorldTokenizer().decode(prompt.tolist()).split("Question")[0] in ("User: ", "Input: ", "Question: ", "")

    run = prepare_pairs(folder, *common, "--out_dir", "original", "--valid_ratio", 0.3, "--original_format", 1)
    assert run.returncode == 0, run.stderr
    rows = torch.load(folder / "original" / "trainset.save", weights_only=True)
    assert [row[0] for row in rows] == [sets[0].pair(i)[0].tolist() for i in range(len(sets[0]))]
    assert [row[3:] for row in rows] == [tuple(logps) for logps in sets[0].ref_logps.tolist()]


def die_at(n: int) -> None:
    """Has the process kill itself, as the kernel would, at the n-th of its calls to os.fsync or os.replace: before it, or (a negative n)
    after it; at none for 0."""
    calls = 0

    def deadly(call):
        def run(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
            call(*arguments, **options)
            if calls == -n:
                os.kill(os.getpid(), signal.SIGKILL)

        return run

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)


def scored_by_a_tiny_model(source) -> list[str]:
    model = save_tiny_model(source.parent / "tiny.pth")
    options = {"source": source, "load_model": model, "device": "cpu", "wkv_backend": "reference", "batch_tokens": 120}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_and_started_again_ends_with_the_same_bytes(source, lives):
    out, common, log = source.parent / "out", scored_by_a_tiny_model(source), source.parent / "log.txt"

    def life(folder, n):
        process = lives.start_script(SCRIPT, [*common, "--out_dir", str(folder)], log, prepare=functools.partial(die_at, n))
        return lives.end([process], log)[0]

    assert life(source.parent / "whole", 0) == 0, log.read_text()
    whole = contents(source.parent / "whole")
    assert sorted(whole) == ["report.html", "report.json", "testset.save", "trainset.save", "validset.save"]

    # In the journal (before the first, after the second, before the fourth batch is on the disk): every run goes further.
    sizes = []
    for n in (1, -2, 4):
        assert life(out, n) == -signal.SIGKILL, log.read_text()
        sizes.append((out / "reference.journal").stat().st_size)
        assert not (out / "trainset.save").exists()
    assert sizes == sorted(set(sizes))
    n_kills = 0
    while (status := life(out, -1 - n_kills)) == -signal.SIGKILL:
        # Each run lives for one call more than the one before: through the rest of the journal, then through the files.
        n_kills += 1
        for path in out.iterdir():
            assert path.name in ("reference.journal", *whole) or path.name.endswith(".part")
            assert path.read_bytes() == whole.get(path.name, path.read_bytes())
    assert status == 0, log.read_text()
    assert n_kills >= 8
    assert contents(out) == whole


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(source, capsys):
    """A limit on the size of a file stands in for the disk: it stops the journal, or the file of the training pairs. `capsys` keeps what
    is printed in memory, which has no such limit."""
    resource = pytest.importorskip("resource")
    out, common = source.parent / "out", scored_by_a_tiny_model(source)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, name in ((200, "reference.journal"), (2000, "trainset.save")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(InputError, match=rf"{out}/{name}: cannot be written: File too large$") as error:
                script.main([*common, "--out_dir", str(out)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(error.value)
        assert os.listdir(out) == ["reference.journal"]
    for folder in ("out", "whole"):
        script.main([*common, "--out_dir", str(source.parent / folder)])
    assert contents(out) == contents(source.parent / "whole")


def test_what_other_flags_made_is_kept_until_overwrite_and_what_is_lost_is_told(source, capsys):
    from rwkv_dpo.commands import prepare_pairs as script

    folder = source.parent
    model = save_tiny_model(folder / "tiny.pth")
    common = ["--source", source, "--load_model", model, "--device", "cpu", "--out_dir", folder / "out", "--ctx_len", 64]

    def run(*flags):
        script.main(list(map(str, [*common, *flags])))
        return capsys.readouterr()

    assert "warning:" not in run().err
    first = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    assert "out holds the pair files that these flags make; --overwrite 1 makes them again" in run().out
    for flags in (["--seed", 1], ["--original_format", 1], ["--ctx_len", 8]):
        with pytest.raises(InputError, match=r"out holds pair files that these settings don't make \(.*\): --overwrite 1 replaces them"):
            run(*flags)
        assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == first
    capsys.readouterr()
    told = run("--ctx_len", 8, "--overwrite", 1, "--valid_ratio", 1e-9).err
    assert "warning: 28 of 40 rows were dropped: prompt does not fit\n" in told
    assert "warning: 11 of 11 pairs lost the beginning of their prompt to a ctx_len of 8\n" in told
    assert f"warning: {folder}/out/validset.save will be empty: none of the " in told
    assert sum(map(len, load_splits(folder / "out"))) == 11


def test_malformed_rows_are_skipped_when_asked_and_a_users_template_is_used(prepare_pairs, tmp_path):
    lines = ['{"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}', "{", '{"prompt": "p", "chosen": "c"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / "own.txt").write_text("## {prompt} ##\n")
    model = save_tiny_model(tmp_path / "tiny.pth")
    common = ("--source", "rows.*", "--load_model", model, "--device", "cpu", "--wkv_backend", "reference", "--valid_ratio", 0)
    run = prepare_pairs(tmp_path, *common, "--test_ratio", 0, "--on_error", "skip", "--templates", "own.txt", "--format", "plain")
    assert run.returncode == 0, run.stderr
    assert "rows.jsonl: line 2: not JSON: Expecting property name" in run.stdout
    train = load_splits(tmp_path)[0]
    assert WorldTokenizer().decode(train.pair(0)[0].tolist()) == "## Hi ##"
    assert train.header["counts"]["dropped"] == {"malformed": 2}


def test_rankings_of_named_columns_become_pairs_and_templates_are_told_once(source, capsys):
    rows = [{"ask": f"User: Question {i}?\n\nAssistant:", "all": ["b", "a", "c"], "stars": [2, 3, 1]} for i in range(4)]
    source.write_text(json.dumps(rows))
    flags = ["--columns", "prompt=ask,answers=all,scores=stars", "--rank_pairs", "adjacent", "--valid_ratio", "0", "--test_ratio", "0"]
    out = source.parent / "out"
    script.main([*scored_by_a_tiny_model(source), "--out_dir", str(out), "--templates", "chat", *flags])
    told = capsys.readouterr().out
    assert told.count("4 prompts with a chat template were turned into turns\n") == 1
    report = json.loads((out / "report.json").read_text())
    assert report["source"] == {
        "rows": 4, "noted": {"prompts with a chat template were turned into turns": 4, "rankings of 3 answers": 4}
    }  # fmt: skip
    train, tokenizer = load_splits(out)[0], WorldTokenizer()
    assert [[tokenizer.decode(part.tolist()) for part in train.pair(i)] for i in (0, 1)] == [
        ["User: Question 0?\n\nAssistant:", " a\n\n", " b\n\n"], ["User: Question 0?\n\nAssistant:", " b\n\n", " c\n\n"]
    ]  # fmt: skip
    assert (len(train), train.n_trees) == (8, 4)
    assert [train.scores[i].tolist() for i in (0, 1)] == [[3, 2], [2, 1]]
    assert report["trees"] == {"trees": 4, "answers": 12, "most_pairs": 2, "most_tokens": train.tree_tokens.max()}
    assert "Question 0?" in (out / "report.html").read_text()
    script.main([*scored_by_a_tiny_model(source), "--out_dir", str(out / "far"), "--min_gap", "2", *flags[:2], *flags[4:]])
    assert len(load_splits(out / "far")[0]) == 4


def test_rows_that_are_all_dropped_end_the_run_with_the_first_of_them(source, capsys):
    rows = [{"prompt": "Why?", "chosen": "a", "rejected": f"b{i}", "score_chosen": 1, "score_rejected": 2 + i} for i in range(3)]
    source.write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r'rows.json: no usable pair among its 3 rows; the first is \{prompt: "Why\?", chosen: "a"'):
        script.main(scored_by_a_tiny_model(source))
    assert "warning: 3 of 3 rows were dropped: scores contradict\n" in capsys.readouterr().err


def test_a_hub_id_that_cannot_be_reached_is_named(source):
    (source.parent / "any.pth").write_bytes(b"")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(source.parent)}
    command = [sys.executable, SCRIPT, "--source", "owner/name", "--load_model", "any.pth"]
    run = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert run.stderr.startswith("prepare_pairs.py: owner/name: ")
    assert run.stderr.count("\n") == 1


def test_a_model_with_a_smaller_vocabulary_is_refused(prepare_pairs, source):
    model = save_tiny_model(source.parent / "small.pth", vocab_size=300)
    run = prepare_pairs(source.parent, "--source", source, "--load_model", model, "--device", "cpu", "--wkv_backend", "reference")
    assert run.returncode == 2
    assert "small.pth: row 1: token" in run.stderr
    assert "outside the vocabulary of 300" in run.stderr


def test_it_starts_as_a_program():
    assert os.access(SCRIPT, os.X_OK)
    assert SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load_model", "none.pth"], "--load_model none.pth: no such file"),
        (["--source", "none.json"], "none.json: cannot be read: No such file or directory"),
        (["--source", "bad.json"], "bad.json: row 1: has the columns 'prompt'; a row has"),
        (["--split", "train"], "--split train: "),
        (["--templates", "own"], "--templates own: accepted are mix, chat"),
        (["--format", "parquet"], "argument --format: invalid choice"),
        (["--columns", "ask"], "--columns ask: 'ask' is not ROLE=COLUMN"),
        (["--rank_pairs", "best"], "--rank_pairs best: accepted are best_worst, best_rest, adjacent, all, and random:N"),
        (["--min_gap", "-1"], "--min_gap -1.0: at least 0 is accepted"),
        (["--source", "*.jsonl"], "*.jsonl: matches no file"),
        (["--source", "empty.json"], "empty.json: no usable pair among its 0 rows"),
        (["--ctx_len", "1"], "--ctx_len 1: at least 2 is accepted"),
        (["--batch_tokens", "0"], "--batch_tokens 0: at least 1 is accepted"),
        (["--valid_ratio", "0.6", "--test_ratio", "0.4"], "--valid_ratio 0.6 --test_ratio 0.4: neither may be below 0"),
        (["--valid_ratio", "nan"], "--valid_ratio nan"),
        (["--out_dir", "bad.json"], "--out_dir bad.json: cannot be created: File exists"),
    ],
)
def test_faults_are_one_line_and_exit_2(prepare_pairs, source, arguments, message):
    folder = source.parent
    (folder / "bad.json").write_text('[{"prompt": "p"}]')
    (folder / "empty.json").write_text("[]")
    (folder / "any.pth").write_bytes(b"")
    # The last of two equal flags wins.
    run = prepare_pairs(folder, "--source", source, "--load_model", "any.pth", *arguments)
    assert run.returncode == 2
    assert run.stderr.startswith(f"prepare_pairs.py: {message}")
    assert run.stderr.count("\n") == 1
