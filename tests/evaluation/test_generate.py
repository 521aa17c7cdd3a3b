"""Generation against the `rwkv` package, argmax over full sequences, and what each way of sampling promises."""

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.data.tokenizer import VOCAB_SIZE, WorldTokenizer
from rwkv_dpo.evaluation.dialogue import Dialogue
from rwkv_dpo.evaluation.generate import Sampler, Sampling, answers, generate, read
from rwkv_dpo.model.shape import ModelShape
from rwkv_package import package_model

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    return random_model(ModelShape(2, 32, 32, 96, VOCAB_SIZE, head_size=32), torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return WorldTokenizer()


def likeliest(model, tokens, n):
    """n tokens, each from the whole sequence so far."""
    picked = []
    for _ in range(n):
        builder = ForestBuilder()
        builder.add(np.array(tokens + picked))
        hidden, _ = model(builder.build()[0])
        picked.append(int(model.head(hidden[-1])[: VOCAB_SIZE - 6].argmax()))
    return picked


@torch.no_grad()
def test_greedy_tokens_are_the_likeliest_after_the_whole_text_so_far(model, tokenizer):
    answer = generate(model, tokenizer, "User: hello", max_tokens=5, temperature=0, top_p=1, seed=0)
    assert answer == tokenizer.decode(likeliest(model, tokenizer.encode("User: hello"), 5)).strip()


def test_greedy_answers_are_those_of_the_rwkv_package(model, tokenizer, tmp_path):
    pytest.importorskip("rwkv")
    package = package_model(model, tmp_path)
    prompts = ["User: hello\n\nAssistant:", "a", "The sky is \u84dd"]
    got = answers(model, tokenizer, prompts, 1, GREEDY, 8, 0)
    for prompt, (answer,) in zip(prompts, got, strict=True):
        logits, state = package.forward(tokenizer.encode(prompt), None)
        tokens = []
        for _ in range(8):
            tokens.append(int(logits[: VOCAB_SIZE - 6].argmax()))
            logits, state = package.forward(tokens[-1:], state)
        assert answer == tokenizer.decode(tokens).partition("\n\n")[0].strip()


def test_answers_in_a_batch_are_those_of_one_by_one(model, tokenizer):
    prompts = ["User: hello", "a", "User: Why?\n\nAssistant: Because.\n\nUser: And?\n\nAssistant:"]
    together = answers(model, tokenizer, prompts, 2, GREEDY, 6, 0)
    assert together == [[generate(model, tokenizer, prompt, 6, 0, 1, 0)] * 2 for prompt in prompts]
    assert answers(model, tokenizer, ["a"], 3, GREEDY, 0, 0) == [["", "", ""]]


def test_a_seed_decides_the_answer(model, tokenizer):
    def ask(seed):
        return answers(model, tokenizer, ["a"], 2, Sampling(), 8, seed)[0]

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)
    assert ask(1)[0] != ask(1)[1]


def shares(sampling, probabilities, n=4000):
    """How often each token is drawn first, and the sampler."""
    sampler = Sampler(sampling, n, len(probabilities), torch.Generator().manual_seed(0))
    drawn = sampler.draw(torch.log(torch.tensor(probabilities)).expand(n, -1))
    return (torch.bincount(drawn, minlength=len(probabilities)) / n).tolist()


@pytest.mark.parametrize(("sampling", "expected"), [
    (Sampling(), [0.1, 0.5, 0.15, 0.25]),
    (Sampling(top_p=0.7), [0, 2 / 3, 0, 1 / 3]),
    (Sampling(top_p=0.4), [0, 1, 0, 0]),
    (Sampling(top_p=0), [0, 1, 0, 0]),
    (Sampling(top_k=3), [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
    (Sampling(min_p=0.3), [0, 5 / 9, 1.5 / 9, 2.5 / 9]),
    (Sampling(top_k=3, top_p=0.8), [0, 2 / 3, 0, 1 / 3]),  # of what is left, 0.5 and 0.25 make up 0.83
    (Sampling(temperature=0.5), [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
    (Sampling(temperature=0), [0, 1, 0, 0]),
], ids=str)  # fmt: skip
def test_tokens_are_drawn_as_often_as_it_is_claimed(sampling, expected):
    got = shares(sampling, [0.1, 0.5, 0.15, 0.25])
    # Four standard deviations of a share of 4,000 draws.
    assert got == pytest.approx(expected, abs=4 * 0.5 / 4000**0.5)
    assert [share == 0 for share in got] == [share == 0 for share in expected]


def test_penalties_by_hand():
    sampling = Sampling(temperature=0, presence=0.5, repetition=1.0, decay=0.5)
    sampler = Sampler(sampling, 1, 3, torch.Generator())
    # 0 is drawn at 2.0; then it is worth 2 - 0.5 - 1, less than 1.2; then 2 - 0.5 - 0.5 = 1.0 against 1.2 - 1.5 and 0.9.
    assert [int(sampler.draw(torch.tensor([[2.0, 1.2, 0.9]]))) for _ in range(3)] == [0, 1, 0]
    assert sampler.counts.tolist() == [[1.25, 0.5, 0]]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
def test_answers_that_are_kept_keep_what_they_have(rows):
    sampler = Sampler(Sampling(temperature=0, repetition=5.0), 3, 3, torch.Generator())
    first = sampler.draw(torch.eye(3))
    sampler.keep(rows)
    second = sampler.draw(torch.eye(3)[rows])
    assert first.tolist() == [0, 1, 2]
    assert all(token != row for token, row in zip(second.tolist(), rows, strict=True))


def test_only_tokens_that_the_tokenizer_knows_are_drawn(model, tokenizer):
    with torch.no_grad():
        before = model.head.weight.clone()
        # Whatever the last hidden state is, one of the two is likelier than all known tokens.
        model.head.weight[65530], model.head.weight[65535] = 100 * before[1], -100 * before[1]
        try:
            assert isinstance(generate(model, tokenizer, "a", 3, temperature=0, top_p=1, seed=0), str)
        finally:
            model.head.weight.copy_(before)


def dialogue_of(model, tokenizer, max_tokens=6, sampling=GREEDY, system=""):
    return Dialogue(model, tokenizer, sampling, max_tokens, 0, system)


def test_every_turn_answers_the_whole_dialogue_so_far(model, tokenizer):
    dialogue = dialogue_of(model, tokenizer, system="Be brief.")
    text = "System: Be brief.\n\n"
    for question in ("Hello there", "And\n\nnow?"):
        text += f"User: {' '.join(question.split())}\n\nAssistant:".replace("And now", "And\nnow")
        said = "".join(dialogue.say(question))
        tokens = likeliest(model, tokenizer.encode(text), 6)
        raw = tokenizer.decode(tokens)
        assert said == dialogue.messages[-1]["content"] == raw.partition("\n\n")[0].strip()
        text += raw.partition("\n\n")[0] + "\n\n"
    assert [message["role"] for message in dialogue.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_a_turn_costs_its_own_tokens_alone(model, tokenizer, monkeypatch):
    read_so_far = []
    monkeypatch.setattr("rwkv_dpo.evaluation.dialogue.read", lambda model, sequences, states: (
        read_so_far.append(len(sequences[0])), read(model, sequences, states))[1])  # fmt: skip
    dialogue = dialogue_of(model, tokenizer)
    for _ in range(4):
        list(dialogue.say("Why is the sky blue?"))
    # What closes the turn before comes on top.
    assert max(read_so_far[1:]) <= read_so_far[0] + 2


def test_undo_and_retry(model, tokenizer):
    dialogue = dialogue_of(model, tokenizer, sampling=Sampling())
    assert not dialogue.undo()
    assert list(dialogue.retry()) == []
    first = "".join(dialogue.say("Hello"))
    list(dialogue.say("Bye"))
    assert dialogue.undo()
    assert [message["content"] for message in dialogue.messages] == ["Hello", first]
    assert "".join(dialogue.retry()) != first
    assert len(dialogue.messages) == 2
    dialogue.reset()
    assert dialogue.messages == []
