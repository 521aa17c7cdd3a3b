"""What is evaluated beside held-out pairs: a corpus, and answers to prompts; and the end that --early_stop makes of it."""

import functools
import json
import logging
import math

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
from runs import run_to
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.commands import train
from rwkv_dpo.data.corpus import open_corpus
from rwkv_dpo.data.tokenizer import VOCAB_SIZE
from rwkv_dpo.model.checkpoint import load_model
from rwkv_dpo.model.shape import ModelShape
from rwkv_dpo.training import validation

flags = functools.partial(runs.flags, dropout=0.1)  # two epochs of four steps
WORLD = ModelShape(n_layer=1, n_embd=16, dim_att=16, dim_ffn=32, vocab_size=VOCAB_SIZE, head_size=8)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Inputs for a model that reads text."""
    folder = tmp_path_factory.mktemp("world")
    runs.write_inputs(folder, WORLD, 6)
    (folder / "prompts.txt").write_text("Hello\n\n  What is it? \n")
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_held_out_corpus_is_the_mean_cross_entropy_of_its_windows(data, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train.main(flags(data, tmp_path / "out", valid_data_file="DATA/corpus.bin", valid_data_type="uint16", eval_every=4, eval_windows=5))
    model = load_model(str(data / "model.pth"), device=torch.device("cpu"), compute_dtype=torch.float32)
    corpus = open_corpus(str(data / "corpus.bin"), "uint16", 61, 12)
    losses = []
    for start in range(0, 60, 12):
        window = corpus.window(start, 13)
        builder = ForestBuilder()
        builder.add(window[:-1])
        with torch.no_grad():
            logits = model.head(model(builder.build()[0])[0])
        losses.append(F.cross_entropy(logits.double(), torch.from_numpy(window[1:])).item())
    first, *rest = lines(tmp_path / "out" / "valid.jsonl")
    wanted = sum(losses) / 5
    assert (first["step"], first["windows"], [record["step"] for record in rest]) == (0, 5, [4, 8])
    assert first["corpus_loss"] == pytest.approx(wanted, abs=1e-5)
    assert first["corpus_perplexity"] == pytest.approx(math.exp(wanted), rel=1e-5)
    assert f"epoch 0, step 0, 5 held-out windows: loss {wanted:.4f}, perplexity {math.exp(wanted):.2f}" in caplog.text


def test_all_windows_are_evaluated_beside_pairs(data, tmp_path):
    train.main(flags(data, tmp_path / "out", valid_data_file="DATA/corpus.bin", valid_data_type="uint16", dpo_valid_file="DATA/valid.save"))
    record = lines(tmp_path / "out" / "valid.jsonl")[-1]
    assert record["windows"] == (4000 - 1) // 12
    assert {"corpus_loss", "rewards/margins", "lengths/preferred"} <= record.keys()


def watched(monkeypatch, values):
    """Evaluations whose figures are these, by optimizer step."""
    steps, evaluate = [0], validation.HeldOut._evaluate

    def at_step(self, trainer, module):
        steps[0] = trainer.global_step
        evaluate(self, trainer, module)

    def evaluated(model, pairs, mixture, batch_tokens, progress):
        return {"loss_dpo": values.get(steps[0], 9.0), "rewards/accuracies": 0.5, "rewards/margins": 0.0}

    monkeypatch.setattr(validation, "evaluate_pairs", evaluated)
    monkeypatch.setattr(validation.HeldOut, "_evaluate", at_step)


FIGURES = {0: 0.7, 1: 0.6, 2: 0.65, 3: 0.5, 4: 0.6, 5: 0.5, 6: 0.55, 7: 0.4}
STOPS = {"dpo_valid_file": "DATA/valid.save", "eval_every": 1, "lr_init": 0.1, "lr_final": 0.1}


def steps_of(folder):
    return [record["step"] for record in lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize(("patience", "last"), [(1, 2), (2, 5), (3, 6), (4, 8)])
def test_without_a_better_figure_for_long_enough_a_run_ends_as_one_of_so_many_steps(data, tmp_path, monkeypatch, patience, last):
    watched(monkeypatch, FIGURES)
    train.main(flags(data, tmp_path / "out", **STOPS, early_stop=patience))
    assert steps_of(tmp_path / "out") == list(range(1, last + 1))
    monkeypatch.undo()
    # At a constant learning rate the steps of a shorter run are the first of a longer one.
    steps = {"epoch_steps": last, "epoch_count": 1} if last <= 4 else {"my_exit_tokens": last * 2 * 12}
    train.main(flags(data, tmp_path / "short", **STOPS | steps))
    ends = [torch.load(tmp_path / name / "rwkv-final.pth") for name in ("out", "short")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_that_was_resumed_ends_at_the_same_step_and_is_finished(data, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    watched(monkeypatch, FIGURES)
    own = flags(data, tmp_path / "out", **STOPS, early_stop=3, keep_best="loss_dpo")
    run_to(5, own)
    train.main(own)
    assert steps_of(tmp_path / "out") == [1, 2, 3, 4, 5, 6]
    assert "no better loss_dpo in 3 evaluations: the run ends after step 6 (--early_stop)" in caplog.text
    train.main(own)
    assert "holds the end of this run (rwkv-final.pth)" in caplog.text
    assert steps_of(tmp_path / "out") == [1, 2, 3, 4, 5, 6]


def test_with_more_patience_a_run_goes_on_from_where_it_has_ended(data, tmp_path, monkeypatch):
    watched(monkeypatch, FIGURES)
    train.main(flags(data, tmp_path / "out", **STOPS, early_stop=2))
    train.main(flags(data, tmp_path / "out", **STOPS, early_stop=0))
    train.main(flags(data, tmp_path / "whole", **STOPS))
    assert steps_of(tmp_path / "out") == list(range(1, 9))
    ends = [torch.load(tmp_path / name / "rwkv-final.pth") for name in ("out", "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not (tmp_path / "out" / "last").exists()


def test_the_base_model_and_the_current_one_answer_the_same_prompts(world, tmp_path):
    own = {"sample_prompts": "DATA/prompts.txt", "sample_tokens": 6, "lr_init": 0.1, "lr_final": 0.1}
    train.main(flags(world, tmp_path / "out", **own, eval_every=3))
    train.main(flags(world, tmp_path / "ends", **own))
    found = lines(tmp_path / "out" / "samples.jsonl")
    assert [line["step"] for line in found] == [0, 3, 4, 6, 8]
    assert [sample["prompt"] for sample in found[0]["samples"]] == ["Hello", "What is it?"]
    assert all(sample["base"] == sample["now"] for sample in found[0]["samples"])
    assert len({line["samples"][0]["base"] for line in found}) == 1
    assert found[-1]["samples"][0]["now"] != found[0]["samples"][0]["now"]
    # Nothing else was evaluated; without --eval_every there are the ends of epochs, after the start.
    assert not (tmp_path / "out" / "valid.jsonl").exists()
    assert lines(tmp_path / "ends" / "samples.jsonl") == [line for line in found if line["step"] in (0, 4, 8)]
    assert (tmp_path / "ends" / "rwkv-final.pth").read_bytes() == (tmp_path / "out" / "rwkv-final.pth").read_bytes()


def test_greedy_answers_are_those_of_chat_py(world, tmp_path):
    own = {"sample_prompts": "DATA/prompts.txt", "sample_tokens": 8, "lr_init": 0.1, "lr_final": 0.1}
    train.main(flags(world, tmp_path / "out", **own))
    from rwkv_dpo.commands import chat

    for which, checkpoint in (("base", world / "model.pth"), ("now", tmp_path / "out" / "rwkv-final.pth")):
        arguments = f"--load_model {checkpoint} --prompts {world}/prompts.txt --out {tmp_path}/a.jsonl --max_tokens 8 --temperature 0"
        chat.main([*arguments.split(), "--device", "cpu"])
        told = [row["answers"][0] for row in lines(tmp_path / "a.jsonl")]
        assert [sample[which] for sample in lines(tmp_path / "out" / "samples.jsonl")[-1]["samples"]] == told


def test_a_resumed_run_has_the_same_samples(world, tmp_path):
    own = {"sample_prompts": "DATA/prompts.txt", "sample_tokens": 6, "eval_every": 2, "sample_temperature": 1.0, "sample_top_p": 0.9}
    train.main(flags(world, tmp_path / "whole", **own))
    run_to(3, flags(world, tmp_path / "parts", **own))
    train.main(flags(world, tmp_path / "parts", **own))
    assert lines(tmp_path / "parts" / "samples.jsonl") == lines(tmp_path / "whole" / "samples.jsonl")
    assert (tmp_path / "parts" / "rwkv-final.pth").read_bytes() == (tmp_path / "whole" / "rwkv-final.pth").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_3"])
def test_two_processes_write_one_line_each_time(world, tmp_path, lives, strategy):
    own = {"sample_prompts": "DATA/prompts.txt", "sample_tokens": 5, "devices": 2, "strategy": strategy}
    processes = lives.start(flags(world, tmp_path / "out", **own), tmp_path / "log.txt", world_size=2)
    assert lives.end(processes, tmp_path / "log.txt") == [0, 0], (tmp_path / "log.txt").read_text()
    train.main(flags(world, tmp_path / "one", sample_prompts="DATA/prompts.txt", sample_tokens=5))
    two, one = (lines(tmp_path / name / "samples.jsonl") for name in ("out", "one"))
    assert [line["step"] for line in two] == [0, 4, 8]
    assert two[0] == one[0]


@pytest.mark.parametrize(("prompts", "words"), [
    (b"\xff", "not UTF-8: invalid start byte at byte 0"), (b"\n", "holds no prompt"), (None, "cannot be read: No such file"),
])  # fmt: skip
def test_prompts_that_are_none(world, tmp_path, prompts, words):
    if prompts is not None:
        (tmp_path / "p.txt").write_bytes(prompts)
    with pytest.raises(InputError, match=f"--sample_prompts .*p.txt: {words}"):
        train.main(flags(world, tmp_path / "out", sample_prompts=tmp_path / "p.txt"))


def test_a_vocabulary_that_is_not_the_tokenizers(data, tmp_path):
    (tmp_path / "p.txt").write_text("Hello")
    words = r"--sample_prompts .*: text becomes tokens of the World tokenizer, 65536 of them; the model has a vocabulary of 61"
    with pytest.raises(InputError, match=words):
        train.main(flags(data, tmp_path / "out", sample_prompts=tmp_path / "p.txt"))


def test_a_held_out_corpus_of_other_tokens(data, tmp_path):
    np.save(tmp_path / "other.npy", np.full(100, 61))
    with pytest.raises(InputError, match=r"other\.npy"):
        train.main(flags(data, tmp_path / "out", valid_data_file=tmp_path / "other.npy"))
    assert "rwkv-final.pth" not in [path.name for path in tmp_path.rglob("*")]
