"""Pairs that become trees, in memory and in files of version 2."""

import io
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.data.pairs import join_pairs, pack_pairs, pairs_sha256
from rwkv_dpo.data.preference import Notes, Preference, Ranking
from rwkv_dpo.data.prepare import prepare
from rwkv_dpo.data.rankings import Pairing, paired
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.data.trees import grow

row = st.lists(st.integers(0, 2), min_size=1, max_size=4)


def packed(rows, scores=None):
    n = len(rows)
    return pack_pairs([tuple(map(np.array, pair)) for pair in rows], -1.0 - np.arange(2 * n).reshape(n, 2), {"ctx_len": 9}, scores)


def content(pairs):
    return [
        (*(part.tolist() for part in pairs.pair(i)), *pairs.ref_logps[i].tolist(), *pairs.scores[i].tolist()) for i in range(len(pairs))
    ]


@given(st.lists(st.tuples(row, row, row), max_size=12), st.integers(1, 60))
def test_no_pair_is_lost_or_changed_and_no_tree_is_larger_than_allowed(rows, tree_tokens):
    pairs = packed(rows, np.arange(2.0 * len(rows)).reshape(-1, 2)[:, ::-1])
    grown, before, relatives = grow(pairs, tree_tokens)
    assert sorted(before) == list(range(len(rows)))
    assert content(grown) == [content(pairs)[i] for i in before]
    for t, n_tokens in enumerate(grown.tree_tokens):
        tree = [[part.tolist() for part in grown.pair(i)] for i in grown.tree(t)]
        held = {(*p,): p for p, *_ in tree} | {(*p, None, *a): a for p, *both in tree for a in both}
        assert n_tokens == sum(map(len, held.values()))
        assert n_tokens <= tree_tokens or len(tree) == 1
    # Pairs with the same prompt are related, and only trees that are full are cut apart.
    of_prompt = {}
    for i, (prompt, *_) in enumerate(grown.pair(i) for i in range(len(grown))):
        assert of_prompt.setdefault(tuple(prompt), relatives[i]) == relatives[i]
    assert grow(pairs, 10**6).pairs.n_trees == len(set(relatives))


def test_a_dialogue_that_goes_on_after_an_answer_joins_it():
    """The last token of an answer may be another one where the dialogue goes on: here it was 9, and is 7."""
    question, answer = [1, 2, 3], [4, 5, 9]
    rows = [
        (question, answer, [6]), ([*question, 8, 8], [1], [2]), ([*question, 4, 5, 7, 1], [3], [2]),
        ([*question, 4, 5, 7, 1, 3, 3], [5], [6]), ([*question, 4, 7], [1], [2]), (question, [7, 7], answer),
    ]  # fmt: skip
    grown = grow(packed(rows), 1000)
    assert [[grown.before[i] for i in grown.pairs.tree(t)] for t in range(grown.pairs.n_trees)] == [[0, 2, 3, 5], [1], [4]]
    assert grown.relatives == [0, 0, 0, 0, 1, 4]


def test_files_keep_trees_and_what_has_none_is_written_as_before(tmp_path):
    rows = [([1], [2], [3]), ([4], [5], [6]), ([1], [2], [7])]
    scored = packed(rows, np.array([[2, 1], [np.nan, np.nan], [2, 0.5]]))
    save_pairs(tmp_path / "plain.save", packed(rows))
    save_pairs(tmp_path / "trees.save", grow(scored, 100).pairs)
    plain, trees = load_pairs(tmp_path / "plain.save"), load_pairs(tmp_path / "trees.save")
    with np.load(tmp_path / "plain.save") as arrays:
        assert sorted(arrays) == ["header", "offsets", "ref_logps", "tokens"]
    assert (plain.header["version"], trees.header["version"]) == (1, 2)
    assert str(content(trees)) == str([content(scored)[i] for i in (0, 2, 1)])
    assert trees.trees.tolist() == [0, 2, 3]
    assert len(trees.tokens) == 7  # one prompt and one answer of three are there once
    assert pairs_sha256(trees) != pairs_sha256(plain)


def test_selected_and_joined_trees_stay_together():
    pairs = grow(packed([([1], [2], [3]), ([4], [5], [6]), ([1], [2], [7]), ([1], [7], [3])], np.eye(4, 2)), 100).pairs
    part = pairs.select([0, 2, 3])
    assert content(part) == [content(pairs)[i] for i in (0, 2, 3)]
    assert part.trees.tolist() == [0, 2, 3]
    assert len(part.tokens) == 1 + 3 + 3
    both = join_pairs([part, pairs])
    assert content(both) == content(part) + content(pairs)
    assert both.trees.tolist() == [0, 2, 3, 6, 7]
    assert [row[:5] for row in content(pairs.alone())] == [row[:5] for row in content(pairs)]
    assert pairs.alone().is_plain


def changed(**changes):
    pairs = grow(packed([([1], [2], [3]), ([1], [2], [7]), ([4], [5], [6])], np.zeros((3, 2))), 100).pairs
    arrays = {name: getattr(pairs, name) for name in ("tokens", "offsets", "rows", "trees", "scores", "ref_logps")} | changes
    header = json.dumps({"format": "rwkv_dpo pairs", "version": 2}).encode()
    file = io.BytesIO()
    np.savez(file, header=np.frombuffer(header, np.uint8), **arrays)
    return file.getvalue()


@pytest.mark.parametrize("changes", [
    {"rows": np.array([[0, 1, 2], [0, 1, 3], [4, 5, 9]])},  # a row that is not there
    {"rows": np.array([[0, 1, 2], [0, 1, 2], [4, 5, 6]])},  # one that is in no pair
    {"rows": np.array([[0, 1, 2], [0, 0, 3], [4, 5, 6]])},  # a prompt that is an answer
    {"rows": np.array([[0, 1, 2], [0, 1, 3]])},
    {"rows": np.array([[0, 1, 2], [0, 1, 3], [4, 5, -1]])},
    {"rows": np.array([[0, 1, 2], [0, 1, 3], [4, 5, 6]], dtype=np.int32)},
    {"trees": np.array([0, 2])},
    {"trees": np.array([0, 2, 2, 3])},  # a tree without a pair
    {"trees": np.array([2, 0, 3])},
    {"scores": np.zeros((3, 3))},
    {"scores": np.full((3, 2), np.inf)},
    {"scores": np.zeros((3, 2), dtype=np.float32)},
])  # fmt: skip
def test_arrays_of_trees_that_disagree_are_refused(tmp_path, changes):
    (tmp_path / "a.save").write_bytes(changed(**changes))
    with pytest.raises(InputError, match=r"a\.save: not a pair file: its arrays disagree"):
        load_pairs(tmp_path / "a.save")


def test_a_row_of_several_pairs_is_named_by_the_first_of_them(tmp_path):
    (tmp_path / "a.save").write_bytes(changed())
    with pytest.raises(InputError, match=r"a\.save: row 2: token 7 is outside the vocabulary of 7"):
        load_pairs(tmp_path / "a.save", vocab_size=7)


def test_a_ranking_is_cut_alike_for_all_of_its_pairs_and_is_one_tree():
    prompt, answers = "word " * 60, ["short", "a b c d e f g h i j k l m n o p", "else"]
    ranking = Ranking("row 1", "", (prompt,), tuple(answers), (3.0, 2.0, 1.0))
    prepared = prepare(paired([ranking], Pairing("all"), Notes()), WorldTokenizer(), 40, "chat", 0).grown(160)
    assert (len(prepared.pairs), prepared.pairs.n_trees) == (3, 1)
    assert len(np.unique(prepared.pairs.rows[:, 0])) == 1
    assert prepared.pairs.scores.tolist() == [[3, 2], [3, 1], [2, 1]]
    longest = prepared.pairs.lengths.sum(axis=1) - prepared.pairs.lengths[:, 1:].min(axis=1)
    assert longest.max() == 40


def test_turns_of_one_dialogue_are_one_tree_and_stay_in_one_split():
    first = Preference("row 1", "", ("Where is Rome?",), "In Italy.", "In France.")
    second = Preference("row 2", "", ("Where is Rome?", "In Italy.", "And Paris?"), "In France.", "In Spain.")
    other = Preference("row 3", "", ("Why?",), "Because.", "No.")
    prepared = prepare([second, other, first], WorldTokenizer(), 100, "chat", 0).grown(400)
    assert [len(prepared.pairs.tree(t)) for t in range(prepared.pairs.n_trees)] == [2, 1]
    assert sorted(Counter(prepared.prompt_keys).values()) == [1, 2]
