"""Whatever the words: in every form no answer is lost or swapped, and a chosen one is never worse by its own scores."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv_dpo.data.forms import to_preference
from rwkv_dpo.data.preference import Dropped, Notes, Preference, Ranking
from rwkv_dpo.data.prompts import clean
from rwkv_dpo.data.rankings import Pairing, paired

# Words that are neither marks of a template nor all space, and tell where they come from.
WORDS = st.text(max_size=30).filter(lambda text: not re.search(r"[\[\]<>#:]", text))
SCORES = st.sampled_from([0.0, 1.0, 2.0, 2.5, 5.0])


def said(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


# Each writes answers with scores, the better ones having higher ones, as its set would.
PAIRS = {
    "orca": lambda p, c, r: {"system": "", "question": p, "chosen": c, "rejected": r},
    "alpaca": lambda p, c, r: {"instruction": p, "input": "", "chosen": c, "rejected": r},
    "alpaca list": lambda p, c, r: {"instruction": p, "input": "", "output": [c, r]},
    "openai": lambda p, c, r: {
        "input": {"messages": said(p)}, "preferred_output": said(p, c)[1:], "non_preferred_output": said(p, r)[1:]
    },
    "swift": lambda p, c, r: {"messages": said(p, c), "rejected_response": r},
    "swift dialogue": lambda p, c, r: {"messages": said(p, c), "rejected_messages": said(p, r)},
    "whole": lambda p, c, r: {"prompt": p, "chosen": said(p, c), "rejected": said(p, r)},
    "messages": lambda p, c, r: {"messages": said(p), "chosen": c, "rejected": r},
    "printed by Python": lambda p, c, r: {"chosen": repr(said(p, c)), "rejected": repr(said(p, r))},
    "printed as JSON": lambda p, c, r: {"chosen": json.dumps(said(p, c)), "rejected": json.dumps(said(p, r))},
    "RWKV": lambda p, c, r: {"prompt": f"User: {p}\n\nAssistant:", "chosen": c, "rejected": r},
    "ChatML": lambda p, c, r: {
        "prompt": f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n", "chosen": f"{c}<|im_end|>", "rejected": r
    },
    "Llama 2": lambda p, c, r: {"prompt": f"<s>[INST] {p} [/INST]", "chosen": c, "rejected": r},
    "lists of one": lambda p, c, r: {"prompt": [p], "chosen": [c], "rejected": [r]},
}  # fmt: skip
RANKED = {
    "scores": lambda p, answers, scores: {"prompt": p, "responses": answers, "scores": scores},
    "ranks": lambda p, answers, scores: {"question": p, "answers": answers, "rank": [6 - score for score in scores]},
    "UltraFeedback": lambda p, answers, scores: {
        "instruction": p, "completions": [
            {"response": answer, "overall_score": 9, "annotations": {"honesty": {"Rating": str(score)}, "helpfulness": {"Rating": "N/A"}}}
            for answer, score in zip(answers, scores, strict=True)
        ]
    },
    "Nectar": lambda p, answers, scores: {
        "prompt": f"\n\nHuman: {p}\n\nAssistant: ",
        "answers": [{"answer": answer, "model": "m", "rank": -score} for answer, score in zip(answers, scores, strict=True)],
    },
}  # fmt: skip
TWO = {
    "webgpt": lambda p, a, b, x, y: {
        "question": {"full_text": p}, "answer_0": a, "answer_1": b, "score_0": (x - y) / 5, "score_1": (y - x) / 5
    },
    "helpsteer2": lambda p, a, b, x, y: {"prompt": p, "response_1": a, "response_2": b, "preference_strength": (y > x) - (x > y)},
    "helpsteer3": lambda p, a, b, x, y: {"context": said(p), "response1": a, "response2": b, "overall_preference": y - x},
    "arena": lambda p, a, b, x, y: {
        "conversation_a": said(p, a), "conversation_b": said(p, b), "winner": "tie" if x == y else "model_a" if x > y else "model_b"
    },
    "SHP": lambda p, a, b, x, y: {
        "history": p, "human_ref_A": a, "human_ref_B": b, "labels": int(x > y), "score_A": x, "score_B": y
    },
    "SafeRLHF": lambda p, a, b, x, y: {"prompt": p, "response_0": a, "response_1": b, "better_response_id": int(y >= x)},
    "summaries": lambda p, a, b, x, y: {"info": {"post": p}, "summaries": [{"text": a}, {"text": b}], "choice": int(y >= x)},
}  # fmt: skip


@pytest.mark.parametrize("form", PAIRS)
@settings(max_examples=40)
@given(WORDS, WORDS, WORDS, st.none() | st.tuples(SCORES, SCORES))
def test_no_answer_of_a_pair_is_lost_or_swapped(form, prompt, chosen, rejected, scores):
    prompt, chosen, rejected = f"p {prompt} p", f"c {chosen} c", f"r {rejected} r"
    beside = {} if scores is None else {"chosen_rating": scores[0], "rejected_rating": scores[1]}
    told = to_preference(PAIRS[form](prompt, chosen, rejected) | beside, "row 1")
    if scores and scores[0] <= scores[1]:
        assert told == Dropped("row 1", "tie" if scores[0] == scores[1] else "scores contradict")
    else:
        assert isinstance(told, Preference)
        assert list(map(clean, (*told.turns, told.chosen, told.rejected))) == list(map(clean, (prompt, chosen, rejected)))


@pytest.mark.parametrize("form", [*RANKED, *TWO])
@settings(max_examples=40)
@given(WORDS, st.lists(st.tuples(WORDS, SCORES), min_size=2, max_size=5), st.sampled_from(["best_worst", "best_rest", "adjacent", "all"]))
def test_no_answer_of_a_ranking_is_lost_and_no_worse_one_chosen(form, prompt, rated, way):
    prompt = f"p {prompt} p"
    rated = rated[:2] if form in TWO else rated
    answers, scores = [f"{i} {text} {i}" for i, (text, _) in enumerate(rated)], [score for _, score in rated]
    row = TWO[form](prompt, *answers, *scores) if form in TWO else RANKED[form](prompt, answers, scores)
    told = to_preference(row, "row 1")
    assert isinstance(told, Ranking)
    assert list(told.answers) == answers
    assert clean(told.turns[-1]).removeprefix("POST: ").removesuffix("\nTL;DR:") == clean(prompt)
    score_of = dict(zip(answers, scores, strict=True))
    made = list(paired([told], Pairing(way), Notes()))
    for pair in made:
        if isinstance(pair, Dropped):
            assert pair == Dropped("row 1", "tie")
            assert len(set(scores)) == 1
        else:
            # Sets with a choice for every row have no ties.
            assert score_of[pair.chosen] > score_of[pair.rejected] or (form in ("SafeRLHF", "summaries") and len(set(scores)) == 1)
    if way == "all" and len(set(scores)) > 1:
        assert {text for pair in made for text in (pair.chosen, pair.rejected)} == set(answers)
