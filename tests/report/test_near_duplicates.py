"""Prompts that are nearly the same, found by MinHash and judged by their words."""

from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.report.near_duplicates import LEAST_SIMILARITY, near_duplicates

LONG = "please write a short and friendly letter to my neighbour about the party that we are going to have on the roof next saturday"


def test_what_is_nearly_the_same_is_counted_within_and_between_splits():
    prompts = [LONG, LONG + " night", "why is the sky blue", LONG.replace("please", "kindly"), "how do magnets work in a motor", LONG]
    told = near_duplicates(prompts, ["train", "train", "train", "valid", "test", "train"])
    assert (told["prompts"], told["within"], told["between"]) == (5, {"train": 2}, {"train, valid": 2 + 1})
    # Those between splits come first, and among them the most alike.
    assert [one["splits"] for one in told["first"]] == [["train", "valid"], ["train", "valid"], ["train", "train"]]
    assert told["first"][0]["prompts"] == [LONG, LONG.replace("please", "kindly")]
    # 22 sequences of three words on either side, of which 21 are the same.
    assert told["first"][0]["similarity"] == 21 / 23


def test_letters_of_a_script_without_spaces_are_words():
    one = "请用简单的话解释为什么天空是蓝色的而不是绿色的"
    prompts = [one, one + "呀", "完全不同的问题"]
    assert near_duplicates(prompts, ["train", "test", "train"])["between"] == {"test, train": 2}


@given(st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8).map(" ".join), max_size=12, unique=True))
def test_nothing_is_called_nearly_the_same_that_is_not(prompts):
    def sequences(text):
        words = text.split()
        return {tuple(words[i : i + 3]) for i in range(max(len(words) - 2, 1))}

    for one in near_duplicates(prompts, ["train"] * len(prompts))["first"]:
        a, b = map(sequences, one["prompts"])
        assert one["similarity"] == len(a & b) / len(a | b) >= LEAST_SIMILARITY
