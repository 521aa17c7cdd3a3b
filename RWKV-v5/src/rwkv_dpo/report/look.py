"""A look at pairs before they are scored, and what report.json and report.html say of a preparation."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.data.preference import Notes
from rwkv_dpo.data.prepare import Prepared
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.report.doubts import Texts, doubts
from rwkv_dpo.report.figures import histograms, length_percentiles, lost_shares, preferences, reference_summary, scripts, tree_figures
from rwkv_dpo.report.near_duplicates import near_duplicates

N_SAMPLES = 10
# The longer answer is preferred this often by what is called a bias.
_MUCH = 0.75


def look(prepared: Prepared, rows: Mapping[str, Sequence[int]], tokenizer: WorldTokenizer, ctx_len: int, seed: int) -> dict[str, Any]:
    """What can be told of pairs (at least one) without a model. rows: of each split."""
    pairs = prepared.pairs
    splits = [""] * len(pairs)
    for name, numbers in rows.items():
        for i in numbers:
            splits[i] = name
    texts = _texts(pairs, tokenizer)
    told = {
        "lengths": length_percentiles(pairs),
        "trees": tree_figures(pairs),
        "preferences": preferences(pairs),
        "scripts": scripts(dict.fromkeys(prepared.prompt_keys)),
        "near_duplicates": near_duplicates(prepared.prompt_keys, splits),
        "doubts": doubts(texts),
        "histograms": histograms(pairs),
        "samples": [_sample(pairs, i, splits[i], texts[i]) for i in _drawn(len(pairs), seed)],
    }
    return {**told, "warnings": [*lost_shares(prepared.report.counts(), ctx_len), *_warnings(told)]}


def whole_report(
    looked: Mapping[str, Any], prepared: Prepared, notes: Notes, sources: Mapping[str, Any], scored: PairSet
) -> dict[str, Any]:
    """What report.json holds beside the header and the files, which splits.write_splits adds."""
    told = {"sources": sources} if sources else {}
    dropped = prepared.report.dropped_rows()
    return {"source": notes.as_json(), **told, "dropped_rows": dropped, **looked, "reference": reference_summary(scored)}


def _warnings(told: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{n:,} prompts are nearly the same in two splits ({names}): what is held out is nearly trained on"
        for names, n in told["near_duplicates"]["between"].items()
    ]
    longer = told["preferences"]["longer_preferred"]
    if longer is not None and longer > _MUCH:
        lines.append(f"the longer answer is preferred in {longer:.0%} of the pairs: a model may learn length from them")
    return lines


def _texts(pairs: PairSet, tokenizer: WorldTokenizer) -> list[Texts]:
    """Every pair, written out."""
    rows = np.split(pairs.tokens, pairs.offsets[1:-1])
    texts = [tokenizer.decode(row.tolist()) for row in rows]
    return [Texts(*(texts[row] for row in of_pair)) for of_pair in pairs.rows.tolist()]


def _sample(pairs: PairSet, i: int, split: str, texts: Texts) -> dict[str, Any]:
    parts = {
        name: {"text": text, "tokens": n} for name, text, n in zip(Texts._fields, texts, pairs.lengths[i].tolist(), strict=True)
    }
    scores = pairs.scores[i]
    return {"pair": i + 1, "split": split, "scores": None if np.isnan(scores).any() else scores.tolist(), **parts}


def _drawn(n: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(n), min(N_SAMPLES, n)))
