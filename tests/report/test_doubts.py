"""Signs of what looks wrong, on texts that have them and on texts that don't."""

import pytest
from rwkv_dpo.report.doubts import Texts, doubts

GOOD = Texts("User: Why?\n\nAssistant:", " Because it is so.\n\n", " No idea.\n\n")
LONG = " word" * 60


def signs(**changes):
    return [doubt["what"] for doubt in doubts([GOOD._replace(**changes)])]


@pytest.mark.parametrize(("changes", "what"), [
    ({"chosen": LONG}, "chosen answers end in the middle of a sentence"),
    ({"rejected": LONG + ",\n\n"}, "rejected answers end in the middle of a sentence"),
    ({"chosen": " Yes.<|im_end|>"}, "pairs have markup left over in an answer"),
    ({"rejected": " [/INST] Yes."}, "pairs have markup left over in an answer"),
    ({"chosen": " Yes.\nHuman: And now?"}, "pairs have markup left over in an answer"),
    ({"chosen": " Tom &amp; Jerry<br>"}, "pairs have markup left over in an answer"),
    ({"chosen": " I'm sorry, but I can't help with that."}, "pairs prefer a refusal to an answer"),
    ({"chosen": " As an AI language model, I do not eat."}, "pairs prefer a refusal to an answer"),
    ({"chosen": " \u62b1\u6b49\uff0c\u6211\u4e0d\u80fd"}, "pairs prefer a refusal to an answer"),
    ({"chosen": " No  IDEA."}, "pairs have answers that differ in case and spacing alone"),
])  # fmt: skip
def test_a_sign_is_seen(changes, what):
    assert what in signs(**changes)


@pytest.mark.parametrize("changes", [
    {}, {"prompt": "<|im_end|>"}, {"chosen": LONG + "."}, {"chosen": " a b c"}, {"chosen": " if a < b and c > d: <p"},
    {"rejected": " I'm sorry, but I can't."},
    {"chosen": " I'm sorry, but I can't.", "rejected": " I cannot do that."}, {"chosen": " It is sorry work."},
    {"chosen": " I'm sorry to hear that."}, {"chosen": " As an AI, I can."}, {"chosen": ' return <div className="a">;'}
])  # fmt: skip
def test_what_is_in_order_has_none(changes):
    assert signs(**changes) == []


def test_the_first_pairs_with_a_sign_are_shown_and_all_are_counted():
    bad = GOOD._replace(chosen=" <s> Yes.")
    (doubt,) = doubts([GOOD, bad, bad, bad, bad])
    assert (doubt["pairs"], doubt["share"]) == (4, 0.8)
    assert doubt["first"] == [{"pair": n, "text": "<s> Yes."} for n in (2, 3, 4)]
