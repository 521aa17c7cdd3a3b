"""Votes by lines, as a terminal or a pipe gives them."""

from rwkv_dpo.blind.ballot import Ballot
from rwkv_dpo.blind.cards import Card, Question
from rwkv_dpo.blind.terminal import judge
from rwkv_dpo.blind.votes import open_votes

CARDS = [Card(Question(f"Q{i}?"), (f"first {i}", f"second {i}\x1b[2J\r"), (i % 2, 1 - i % 2)) for i in range(1, 5)]


def after(folder, *typed):
    """The votes that stand, whether it ended, and what was said."""
    said = []
    with open_votes(folder, len(CARDS)) as votes:
        judge(Ballot(CARDS, votes, dict), typed, said.append)
        return votes.choices, votes.is_ended, said


def test_keys_vote_undo_end_and_leave(tmp_path):
    assert after(tmp_path, "1\n", " 2 \n", "0\n", "u\n", "u\n", "B\n")[:2] == ({1: "A", 2: "B"}, False)
    assert after(tmp_path, "a\n", "q\n", "a\n")[:2] == ({1: "A", 2: "B", 3: "A"}, False)
    choices, is_ended, said = after(tmp_path, "=\n", "1\n", "u\n", "2\n", "e\n", "1\n")
    assert (choices, is_ended) == ({1: "A", 2: "B", 3: "A", 4: "B"}, True)
    assert sum("All questions are judged" in line for line in said) == 3  # once as what is typed there is no choice
    assert after(tmp_path, "1\n")[2] == []


def test_a_test_may_end_early_and_the_end_of_the_lines_is_not_its_end(tmp_path):
    assert after(tmp_path, "1\n")[:2] == ({1: "A"}, False)
    assert after(tmp_path, "e\n")[:2] == ({1: "A"}, True)


def test_what_is_typed_wrongly_is_told_and_asked_again(tmp_path):
    choices, _, said = after(tmp_path, "3\n", "\n", "x\x1b\n", "1\n")
    assert choices == {1: "A"}
    assert [line.partition(":")[0] for line in said[1:4]] == ["'3'", "''", "'x\\\\x1b'"]


def test_answers_stand_under_their_sides_and_steer_no_terminal(tmp_path):
    card = after(tmp_path)[2][0]
    assert card.index("Q1?") < card.index("[A]\nsecond 1\\x1b[2J\\r") < card.index("[B]\nfirst 1")
    assert "1 of 4" in card
    assert "\x1b" not in card
