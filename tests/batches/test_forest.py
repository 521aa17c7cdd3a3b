"""The layout of forests and steps, checked against plain lists."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.batches.step import build_step

token_lists = st.lists(st.integers(0, 60), max_size=5)


@given(st.lists(st.tuples(token_lists, st.integers(-1, 6)), min_size=1, max_size=8))
def test_rows_know_the_token_before_them_whatever_the_tree(segments):
    builder, full = ForestBuilder(), []
    for i, (tokens, parent) in enumerate(segments):
        parent = parent if parent < i else -1
        builder.add(tokens, parent)
        full.append((full[parent][0] if parent >= 0 else []) + list(tokens) if parent >= 0 else list(tokens))
        full[i] = (full[i], parent, tokens)
    forest, starts = builder.build()
    n_rows = forest.tokens.numel()
    before = forest.before.tolist()
    for handle, (path, _, tokens) in enumerate(full):
        start = starts[handle]
        assert forest.tokens[start : start + len(tokens)].tolist() == list(tokens)
        if tokens:
            ancestor = path[: len(path) - len(tokens)]
            row = before[start]
            assert (row >= n_rows) == (not ancestor)
            if ancestor:
                assert forest.tokens[row] == ancestor[-1]


@given(st.lists(st.tuples(token_lists, st.integers(-1, 6)), min_size=1, max_size=8))
def test_rows_know_who_comes_after_them_and_which_segments_end_with_them(segments):
    builder = ForestBuilder()
    for i, (tokens, parent) in enumerate(segments):
        builder.add(tokens, parent if parent < i else -1)
    forest, _ = builder.build()
    n_rows, before, last_rows = forest.tokens.numel(), forest.before.tolist(), forest.last_rows.tolist()
    for row in range(n_rows + forest.n_roots):
        after = [i for i in range(n_rows) if before[i] == row] + [n_rows + i for i, last in enumerate(last_rows) if last == row]
        assert forest.uses[forest.uses_start[row] : forest.uses_start[row + 1]].tolist() == after
    assert forest.uses_start[-1] == len(forest.uses)


def test_levels_stand_one_after_the_other_and_cover_every_row():
    builder = ForestBuilder()
    root = builder.add([1, 2, 3])
    child = builder.add([], root)
    builder.add([4], child)
    builder.add([5, 6])
    forest, _ = builder.build()
    assert [(level.first, level.last, level.start, level.end) for level in forest.levels] == [
        (0, 2, 0, 5),
        (2, 3, 5, 5),
        (3, 4, 5, 6),
    ]
    assert forest.levels[1].cu_seqlens.tolist() == [0, 0]
    assert (forest.n_segments, forest.n_roots) == (4, 2)
    assert forest.tokens.tolist() == [1, 2, 3, 5, 6, 4]
    assert forest.last_rows.tolist() == [2, 4, 2, 5]  # an empty segment ends where its parent ended


def test_a_parent_that_was_not_added_is_refused():
    for parent in (3, 0, -2):
        with pytest.raises(IndexError, match=f"segment 0 names parent {parent}, which hasn't been added"):
            ForestBuilder().add([1], parent=parent)


def test_an_empty_forest_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        ForestBuilder().build()


answers = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(
    st.lists(st.tuples(answers | st.just([1, 2]), answers, answers), max_size=4),
    st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=5), max_size=3),
    st.sampled_from(["alone", "by prompt", "together"]),
)
def test_every_answer_token_is_scored_after_its_own_prefix(pairs, windows, trees):
    """Together: prompts of one tree differ, as those of the turns of a dialogue do."""
    if not pairs and not windows:
        return
    arrays = [tuple(np.array(part) for part in pair) for pair in pairs]
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, (prompt, _, _) in enumerate(pairs):
        by_prompt.setdefault(tuple(prompt), []).append(i)
    numbers = {"alone": None, "by prompt": list(by_prompt.values()), "together": [range(len(pairs))] if pairs else []}
    step = build_step([np.array(w) for w in windows], arrays, numbers[trees])
    prefixes = _prefixes(step.forest)

    scored = [(prefixes[row], target) for row, target in zip(step.scored_rows.tolist(), step.targets.tolist(), strict=True)]
    expected_windows = [(tuple(w[: i + 1]), w[i + 1]) for w in windows for i in range(len(w) - 1)]
    assert scored[: step.n_window_rows] == expected_windows

    for i, (prompt, *both) in enumerate(pairs):
        for a, answer in enumerate(both):
            entries = step.entry_rows[step.entry_answers == step.compared.pairs[i, a]].tolist()
            expected = [(tuple(prompt + answer[:t]), answer[t]) for t in range(len(answer))]
            assert sorted(scored[e] for e in entries) == sorted(expected)
    if trees == "together":
        inputs = {tuple((*prompt, *answer)[:n]) for prompt, *both in pairs for answer in both for n in range(1, len(prompt + answer))}
        assert step.forest.tokens.numel() == len(inputs) + sum(len(w) - 1 for w in windows)


def _prefixes(forest) -> list[tuple[int, ...]]:
    """All tokens up to and including each row, found by walking back."""
    before = forest.before.tolist()
    tokens = forest.tokens.tolist()
    result: list[tuple[int, ...]] = []
    for row in range(len(tokens)):  # a predecessor has a smaller number
        earlier = before[row]
        result.append((result[earlier] if earlier < len(tokens) else ()) + (tokens[row],))
    return result


def test_a_common_beginning_of_both_answers_is_computed_and_scored_once():
    prompt, chosen, rejected = np.arange(1, 6), np.array([7, 8, 9, 1]), np.array([7, 8, 2, 3])
    step = build_step([], [(prompt, chosen, rejected)])
    assert step.forest.tokens.tolist() == [1, 2, 3, 4, 5, 7, 8, 9, 2]  # neither answer's last token is an input
    assert step.scored_rows.numel() == 2 + 2 + 2
