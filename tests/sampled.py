"""Samples of optimizer steps for tests: windows of a small corpus, and trees of one to six pairs."""

import itertools

import numpy as np
from rwkv_dpo.batches.samples import Position, Samples
from rwkv_dpo.batches.settings import BatchSettings
from rwkv_dpo.data.corpus import Corpus
from rwkv_dpo.data.pairs import PairSet, pack_pairs
from rwkv_dpo.data.trees import grow

CORPUS = Corpus("numbers", np.arange(4000) % 61, vocab_size=61)
CTX_LEN = 24


def pairs_of_trees(n_trees: int = 14) -> PairSet:
    """Trees of one to six pairs, with scores."""
    rng, rows, scores = np.random.default_rng(1), [], []
    for i in range(n_trees):
        prompt, *answers = (rng.integers(1, 61, n) for n in rng.integers(2, 9, 3 + i % 3))
        for a, b in itertools.combinations(range(len(answers)), 2):
            rows.append((prompt, answers[a], answers[b]))
            scores.append((len(answers) - a, len(answers) - b))
    return grow(pack_pairs(rows, rng.normal(-20, 3, (len(rows), 2)), scores=np.array(scores, float)), 1000).pairs


PAIRS = pairs_of_trees()


def samples_of(world_size: int, accumulated: int = 3, batch_tokens: int = 0, position: Position | None = None, **settings) -> Samples:
    own = BatchSettings(**{"micro_bsz": 2, "batch_tokens": batch_tokens, **settings})
    return Samples(own, CTX_LEN, 4, world_size, accumulated, CORPUS, PAIRS, position or Position())
