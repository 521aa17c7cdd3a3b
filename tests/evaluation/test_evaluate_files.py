"""evaluate.py on several checkpoints, pair files, corpora and prompts, and what it refuses before a model is loaded."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.batches.step import build_step
from rwkv_dpo.commands import evaluate
from rwkv_dpo.data.pair_files import save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.evaluation.generate import generate
from rwkv_dpo.evaluation.scoring import score_pairs
from rwkv_dpo.model import checkpoint
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape
from torch.distributions import Categorical, kl_divergence

WORLD = ModelShape(1, 32, 32, 96, 65536, head_size=32)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """m0.pth, m1.pth and world.pth; a.save and b.save, scored by m0.pth; c.bin and d.bin of 400 and 90 tokens, as d.npy too."""
    folder, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    models = [random_model(ModelShape(1, 32, 32, 96, 61, head_size=32), torch.float32, seed=seed) for seed in range(2)]
    for i, model in enumerate(models):
        save_weights(model.state_dict(), folder / f"m{i}.pth")
    save_weights(random_model(WORLD, torch.float32).state_dict(), folder / "world.pth")
    for name, n in (("a", 40), ("b", 7)):
        pairs = pack_pairs([tuple(rng.integers(0, 61, n) for n in rng.integers(1, 9, 3)) for _ in range(n)])
        save_pairs(folder / f"{name}.save", pairs.with_ref_logps(score_pairs(models[0], pairs, 99), "0" * 64, "fp32"))
    for name, n in (("c", 400), ("d", 90)):
        tokens = rng.integers(0, 61, n).astype("<u2")
        tokens.tofile(folder / f"{name}.bin")
    np.save(folder / "d.npy", tokens)
    return folder


def report_of(inputs, *flags):
    evaluate.main(["--device", "cpu", "--ctx_len", "20", "--out", str(inputs / "r.json"), *(str(flag) for flag in flags)])
    return json.loads((inputs / "r.json").read_text(), parse_constant=pytest.fail)


def paths(inputs, *names):
    return [inputs / name for name in names]


def test_files_of_an_evaluation_are_those_of_evaluations_of_each(inputs, capsys):
    models = ["--load_model", *paths(inputs, "m0.pth", "m1.pth")]
    a, b, c, d = paths(inputs, "a.save", "b.save", "c.bin", "d.npy")
    together = report_of(inputs, *models, "--pairs", a, b, "--data_file", c, d, "--data_type", "uint16", "numpy")
    table = capsys.readouterr().out
    assert [str(one) in table for one in (a, b, c, d)] == [True] * 4
    for pairs, corpus, data_type in ((a, c, "uint16"), (b, d, "numpy")):
        alone = report_of(inputs, *models, "--pairs", pairs, "--data_file", corpus, "--data_type", data_type)
        for one, of_all in zip(alone, together, strict=True):
            assert one["pairs"][str(pairs)] == of_all["pairs"][str(pairs)]
            assert one["corpora"][str(corpus)] == of_all["corpora"][str(corpus)]
            assert one["rewards/margins"] == one["pairs"][str(pairs)]["rewards/margins"]
            assert one["corpus_loss"] == one["corpora"][str(corpus)]["corpus_loss"]
    assert not {"corpus_loss", "rewards/margins"} & set(together[0])
    assert str(a) not in capsys.readouterr().out


def test_the_same_checkpoint_is_no_different_and_the_seed_draws(inputs):
    flags = ["--pairs", inputs / "a.save", "--data_file", inputs / "c.bin", "--data_type", "uint16"]
    first, same = report_of(inputs, "--load_model", inputs / "m1.pth", inputs / "m1.pth", *flags)
    differences = [*same["pairs"][str(inputs / "a.save")]["differences"].values()]
    differences += same["corpora"][str(inputs / "c.bin")]["differences"].values()
    assert len(differences) == 5
    assert all(one == {"mean": 0, "interval": [0, 0]} for one in differences)
    assert first["kl"] == same["kl"] == 0
    (other,) = report_of(inputs, "--load_model", inputs / "m1.pth", *flags, "--seed", 1)
    one, another = (report["pairs"][str(inputs / "a.save")]["intervals"]["logps/margins"] for report in (first, other))
    assert one != another
    assert one == pytest.approx(another, abs=0.2 * (one[1] - one[0]))


def test_the_divergence_is_that_of_the_models(inputs):
    flags = ["--load_model", *paths(inputs, "m0.pth", "m1.pth"), "--data_file", inputs / "d.bin", "--data_type", "uint16"]
    report = report_of(inputs, *flags)
    tokens, models = np.fromfile(inputs / "d.bin", "<u2").astype(np.int64), []
    options = {"device": torch.device("cpu"), "compute_dtype": torch.float64, "wkv_backend": "reference"}
    for name in ("m0.pth", "m1.pth"):
        models.append(checkpoint.load_model(inputs / name, **options).double())
    found = []
    with torch.no_grad():
        for start in (0, 20, 40, 60):
            forest = build_step([tokens[start : start + 21]], []).forest
            q, p = (Categorical(logits=model.head(model(forest)[0])) for model in models)
            found.append(kl_divergence(p, q).mean().item())
    # An fp32 model's, against float64.
    assert report[1]["kl"] == pytest.approx(np.mean(found), rel=1e-4)
    without = report_of(inputs, *flags, "--kl", 0)
    assert "kl" not in without[1]
    assert without[1]["corpus_loss"] == report[1]["corpus_loss"]


@pytest.mark.parametrize(("kl", "alive"), [(1, [[], [0], [0]]), (0, [[], [], []])])
def test_only_the_divergence_keeps_a_model_beside_the_one_that_is_read(inputs, monkeypatch, kl, alive):
    load_model, models, found = checkpoint.load_model, [], []

    def loading(*given, **more):
        gc.collect()
        found.append([i for i, model in enumerate(models) if model() is not None])
        model = load_model(*given, **more)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(checkpoint, "load_model", loading)
    report_of(inputs, "--load_model", *paths(inputs, "m0.pth", "m1.pth", "m0.pth"), "--data_file", inputs / "d.bin", "--data_type",
              "uint16", "--kl", kl)  # fmt: skip
    assert found == alive


def test_prompts_are_written_as_training_writes_them_and_answered_together(inputs, capsys):
    """A blank line within a prompt would end the turn."""
    prompts = ["Why?\n\n\nReally?  ", "How?"]
    common = ["--load_model", inputs / "world.pth", "--temperature", 0, "--max_tokens", 4]
    (report,) = report_of(inputs, *common, "--prompt", *prompts)
    model = checkpoint.load_model(inputs / "world.pth", device=torch.device("cpu"), compute_dtype=torch.float32)

    def greedy(prompt):
        return generate(model, WorldTokenizer(), prompt, 4, 0, 1, 0)

    want = [greedy("User: Why?\nReally?\n\nAssistant:"), greedy("User: How?\n\nAssistant:")]
    assert report["answers"] == [{"prompt": prompt, "answer": answer} for prompt, answer in zip(prompts, want, strict=True)]
    assert want[0] != greedy(f"User: {prompts[0]}\n\nAssistant:")
    assert "answer" not in report
    assert all(answer in capsys.readouterr().out for answer in want[:1])
    (alone,) = report_of(inputs, *common, "--prompt", "How?")
    assert alone["answer"] == want[1]


def test_a_plot_is_a_png(inputs):
    report_of(inputs, "--load_model", inputs / "m1.pth", "--pairs", *paths(inputs, "a.save", "b.save"), "--plot", inputs / "r.png")
    assert (inputs / "r.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_other_vocabularies_have_no_divergence_and_need_not(inputs):
    flags = ["--load_model", *paths(inputs, "m0.pth", "world.pth"), "--data_file", inputs / "d.bin", "--data_type", "uint16"]
    with pytest.raises(InputError, match=r"^--data_file .*d\.bin: .*world\.pth reads it with another vocabulary than .*m0\.pth.* --kl 0"):
        report_of(inputs, *flags)
    assert [report["corpus_loss"] > 0 for report in report_of(inputs, *flags, "--kl", 0)] == [True, True]


def test_models_of_other_characters_have_no_divergence(tmp_path):
    """They read the same text as other tokens."""
    (tmp_path / "c.txt").write_text("abcabcabccba")
    for name, characters in (("x", "abc"), ("y", "cba"), ("z", "abc")):
        (tmp_path / name).mkdir()
        save_weights(random_model(ModelShape(1, 8, 8, 24, 3, head_size=8), torch.float32).state_dict(), tmp_path / name / "m.pth")
        (tmp_path / name / "vocab.json").write_text(json.dumps(dict(enumerate(characters))))
    x, y, z = (tmp_path / name / "m.pth" for name in "xyz")
    with pytest.raises(InputError, match=r"y/m\.pth reads it with another vocabulary than .*x/m\.pth"):
        report_of(tmp_path, "--load_model", x, y, "--data_file", tmp_path / "c.txt", "--ctx_len", 4)
    same = report_of(tmp_path, "--load_model", x, z, "--data_file", tmp_path / "c.txt", "--ctx_len", 4)
    assert same[1]["kl"] == 0
    other = report_of(tmp_path, "--load_model", x, y, "--data_file", tmp_path / "c.txt", "--ctx_len", 4, "--kl", 0)
    assert other[0]["corpus_loss"] != other[1]["corpus_loss"]


REFUSED = {
    "a missing pair file": (["--pairs", "a.save", "none.save"], r"^--pairs .*none\.save: no such pair file$"),
    "a foreign one": (["--pairs", "a.save", "m1.pth"], r"^--pairs .*m1\.pth: "),
    "an empty one": (["--pairs", "a.save", "empty"], r"^--pairs .*empty: "),
    "the same one twice": (["--pairs", "a.save", "b.save", "a.save"], r"^--pairs .*a\.save: named twice$"),
    "pairs of a larger vocabulary": (["--pairs", "large.save"], r"^--pairs .*large\.save: row 1: token 61 is outside the vocabulary of 61"),
    "a missing corpus": (["--data_file", "c.bin", "none.bin", "--data_type", "uint16", "--ctx_len", "9"], r"none\.bin'?: no such file"),
    "a corpus twice": (["--data_file", "c.bin", "c.bin", "--data_type", "uint16"], r"^--data_file .*c\.bin: named twice$"),
    "a corpus that is too short": (["--data_file", "c.bin", "d.bin", "--data_type", "uint16", "--ctx_len", "90"],
                                   r"d\.bin: 90 tokens, fewer than one window of --ctx_len 90 \+ 1$"),
    "types for other files": (["--data_file", "c.bin", "d.bin", "e.bin", "--data_type", "uint16", "numpy"],
                              r"^--data_type: 2 of them for 3 files; one for all is accepted, or one for each file$"),
    "a checkpoint that is none": (["--load_model", "m0.pth", "c.bin"], r"c\.bin"),
    "a missing checkpoint": (["--load_model", "m0.pth", "none.pth"], r"none\.pth: no such checkpoint"),
    "text for a small vocabulary": (
        ["--prompt", "Why?"], r"^--prompt: text becomes tokens of the World tokenizer, .*m0\.pth has a vocabulary",
    ),
    "a prompt of nothing": (["--prompt", "Why?", " "], r"^--prompt: takes texts, each of them once$"),
    "a prompt twice": (["--prompt", "Why?", "Why?"], r"^--prompt: takes texts, each of them once$"),
    "a plot without pairs": (["--plot", "r.png"], r"^--plot draws results on pairs, which --pairs names$"),
    "a plot of another kind": (["--plot", "r.pdf", "--pairs", "a.save"], r"^--plot .*r\.pdf: a \.png file is written$"),
    "a plot nowhere": (["--plot", "nowhere/r.png", "--pairs", "a.save"], r"^--plot .*r\.png: its folder does not exist$"),
    "a name that is too long": (["--out", "x" * 300 + "/r.json"], r"^--out x+/r\.json: its folder does not exist$"),
    "a report nowhere": (["--out", "nowhere/r.json"], r"^--out .*r\.json: its folder does not exist$"),
    "a report that is a folder": (["--out", "."], r"^--out .*: a folder; a file is written$"),
    "a choice that isn't one": (["--kl", "2"], r"--kl"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_faults_are_one_line_and_found_before_a_model_is_loaded(inputs, monkeypatch, case):
    (inputs / "empty").write_bytes(b"")
    save_pairs(inputs / "large.save", pack_pairs([([1], [61], [2])], np.zeros((1, 2))))
    monkeypatch.setattr(checkpoint, "load_model", lambda *given, **more: pytest.fail("a model is loaded"))
    monkeypatch.chdir(inputs)
    flags, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as told:
        evaluate.main(["--device", "cpu", *([] if "--load_model" in flags else ["--load_model", "m0.pth"]), *flags])
    assert "\n" not in str(told.value)
