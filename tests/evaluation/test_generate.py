"""Generation against argmax over full sequences, and against what nucleus sampling promises."""

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.evaluation.generate import _pick, generate
from rwkv_dpo.model.shape import ModelShape


@pytest.fixture(scope="module")
def model():
    return random_model(ModelShape(1, 32, 32, 96, 65536, head_size=32), torch.float32)


@torch.no_grad()
def test_greedy_tokens_are_the_likeliest_after_the_whole_text_so_far(model):
    tokenizer = WorldTokenizer()
    answer = generate(model, tokenizer, "User: hello", max_tokens=5, temperature=0, top_p=1, seed=0)
    tokens = tokenizer.encode("User: hello")
    picked = []
    for _ in range(5):
        builder = ForestBuilder()
        builder.add(np.array(tokens + picked))
        hidden, _ = model(builder.build()[0])
        picked.append(int(model.head(hidden[-1]).argmax()))
    assert answer == tokenizer.decode(picked).strip()


def test_a_seed_decides_the_answer(model):
    def ask(seed):
        return generate(model, WorldTokenizer(), "a", 8, temperature=1, top_p=1, seed=seed)

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_nucleus_sampling_keeps_only_the_likeliest():
    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))
    generator = torch.Generator().manual_seed(0)
    assert {_pick(logits, 1.0, 0.7, generator) for _ in range(200)} == {1, 3}
    assert {_pick(logits, 1.0, 0.4, generator) for _ in range(50)} == {1}
    assert {_pick(logits, 1.0, 1.0, generator) for _ in range(300)} == {0, 1, 2, 3}


def test_only_tokens_that_the_tokenizer_knows_are_drawn(model):
    with torch.no_grad():
        before = model.head.weight.clone()
        # Whatever the last hidden state is, one of the two is likelier than all known tokens.
        model.head.weight[65530], model.head.weight[65535] = 100 * before[1], -100 * before[1]
        try:
            assert isinstance(generate(model, WorldTokenizer(), "a", 3, temperature=0, top_p=1, seed=0), str)
        finally:
            model.head.weight.copy_(before)
