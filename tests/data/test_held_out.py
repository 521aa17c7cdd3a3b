"""Whether held-out pairs are held out."""

import numpy as np
import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.held_out import check_held_out, overlap
from rwkv_dpo.data.pairs import pack_pairs

TRAINED = [([1, 2], [3], [4]), ([5], [6], [7, 8]), ([9], [1], [2])]


def packed(rows, **header):
    return pack_pairs(rows, np.zeros((len(rows), 2)), header)


def told(rows, trained=TRAINED):
    return check_held_out(packed(rows), packed(trained), "valid.save", "train.save")


def test_pairs_and_prompts_in_common_are_counted_to_the_token():
    # A pair of both; another answer to a prompt of both; a prompt that is longer; the tokens of a pair, cut elsewhere.
    held_out = [([5], [6], [7, 8]), ([9], [1], [3]), ([9, 9], [1], [2]), ([1, 2, 3], [4], [5]), ([1], [2, 3], [4])]
    assert overlap(packed(held_out), packed(TRAINED)) == (1, 2)
    assert told(held_out) == (
        "valid.save is not entirely held out: of its 5 pairs 2 have a prompt that is in train.save too, and 1 the answers as well"
    )
    assert told([([7], [6], [8])]) == told([]) == ""


@pytest.mark.parametrize("rows", [TRAINED, TRAINED[1:], [TRAINED[0], TRAINED[0]]])
def test_pairs_that_are_all_trained_on_are_refused(rows):
    with pytest.raises(InputError, match=f"^valid.save: all of its {len(rows)} pairs are in train.save too; nothing is held out"):
        told(rows)


def test_two_preparations_of_one_source_are_refused_and_other_files_are_not():
    def check(one, other):
        return check_held_out(packed([([7], [6], [8])], **one), packed(TRAINED, **other), "valid.save", "train.save")

    first, second = {"source_id": "s", "preparation_id": "a" * 64}, {"source_id": "s", "preparation_id": "b" * 64}
    with pytest.raises(InputError, match=r"^valid.save and train.save are from two preparations of the same preferences \(a{8}\.\.\. and"):
        check(first, second)
    assert check(first, first) == check(first, {**second, "source_id": "t"}) == check(first, {}) == check({}, {}) == ""
