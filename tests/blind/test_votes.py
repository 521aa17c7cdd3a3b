"""votes.jsonl: what stands after votes, undo and kills; and the ballot, which gives nothing away."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.blind.ballot import Ballot
from rwkv_dpo.blind.cards import Card, Question
from rwkv_dpo.blind.votes import open_votes

CARDS = [Card(Question(f"Q{i}", "facts", "en"), (f"first {i}", f"second {i}"), (i % 2, 1 - i % 2)) for i in range(1, 5)]


def lines(folder):
    return [json.loads(line) for line in (folder / "votes.jsonl").read_text().splitlines()]


def test_every_vote_is_a_line_on_the_disk_when_it_is_cast(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append((tmp_path / "votes.jsonl").read_text()))
    with open_votes(tmp_path, 4) as votes:
        votes.vote(2, "A")
        votes.vote(1, "=")
        votes.undo()
        votes.vote(1, "B")
        assert votes.choices == {2: "A", 1: "B"}
    assert [text.count("\n") for text in synced] == [1, 2, 3, 4]
    assert lines(tmp_path) == [
        {"question": 2, "choice": "A"}, {"question": 1, "choice": "="}, {"undo": 1}, {"question": 1, "choice": "B"}
    ]  # fmt: skip
    with open_votes(tmp_path, 4) as again:
        assert list(again.choices.items()) == [(2, "A"), (1, "B")]
        again.undo()
        again.undo()
        again.undo()
        assert again.choices == {}
    assert len(lines(tmp_path)) == 6


@given(st.lists(st.sampled_from(["A", "B", "=", "undo"]), max_size=12), st.integers(0, 400))
def test_whatever_a_kill_leaves_is_the_votes_before(tmp_path_factory, done, kept):
    """The file is cut anywhere: what is whole stands, and voting goes on."""
    folder = tmp_path_factory.mktemp("votes")
    stands = []
    with open_votes(folder, 12) as votes:
        for i, act in enumerate(done, start=1):
            if act == "undo":
                votes.undo()
            else:
                votes.vote(i, act)
            stands.append(((folder / "votes.jsonl").stat().st_size, dict(votes.choices)))
    path = folder / "votes.jsonl"
    path.write_bytes(path.read_bytes()[:kept])
    with open_votes(folder, 13) as votes:
        # A line that lacks its line end alone is whole.
        assert votes.choices == next((choices for size, choices in reversed(stands) if size - 1 <= kept), {})
        votes.vote(13, "A")
    with open_votes(folder, 13) as votes:
        assert next(reversed(votes.choices.items())) == (13, "A")


@pytest.mark.parametrize("line", [
    '{"question": 5, "choice": "A"}', '{"question": 0, "choice": "A"}', '{"question": true, "choice": "A"}',
    '{"question": 2, "choice": "C"}',
    '{"question": 1, "choice": "B"}', '{"undo": 2}', "[1]", "{", '{"end": 1}', '{"question": 2, "choice": ["A"]}',
])  # fmt: skip
def test_a_line_that_is_no_vote_is_named(tmp_path, line):
    (tmp_path / "votes.jsonl").write_text(f'{{"question": 1, "choice": "A"}}\n{line}\n{{"undo": 1}}\n')
    with pytest.raises(InputError, match=r"votes\.jsonl: line 2: no vote of this test"), open_votes(tmp_path, 4):
        pass


def test_nothing_follows_the_end(tmp_path):
    (tmp_path / "votes.jsonl").write_text('{"end": true}\n{"question": 1, "choice": "A"}\n')
    with pytest.raises(InputError, match=r"line 2: no vote"), open_votes(tmp_path, 4):
        pass


def test_one_process_votes_at_a_time(tmp_path):
    with open_votes(tmp_path, 4), pytest.raises(InputError, match="another process is voting"), open_votes(tmp_path, 4):
        pass


def test_a_vote_that_the_disk_has_no_room_for_is_none(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with open_votes(tmp_path, 4) as votes:
        votes.vote(1, "A")
        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", full)
            for act in (lambda: votes.vote(2, "B"), votes.undo, votes.end):
                with pytest.raises(InputError, match=r"votes\.jsonl: cannot be written: No space left"):
                    act()
        assert votes.choices == {1: "A"}
        assert not votes.is_ended
        votes.vote(2, "=")
    assert lines(tmp_path) == [{"question": 1, "choice": "A"}, {"question": 2, "choice": "="}]


def test_a_ballot_asks_in_order_and_takes_what_it_asks_for(tmp_path):
    same = CARDS[2]._replace(answers=("equal", "equal"))
    with open_votes(tmp_path, 4) as votes:
        ballot = Ballot([*CARDS[:2], same, CARDS[3]], votes, lambda: {"models": "told"})
        seen = []
        for choice in "A=B":
            view = ballot.view()
            seen.append((view["number"], view["A"], view["B"], view["judged"], view["questions"]))
            assert not ballot.vote(3, choice)
            assert not ballot.vote(view["number"], "C")
            assert not ballot.vote(str(view["number"]), choice)
            assert ballot.vote(view["number"], choice)
            assert not ballot.vote(view["number"], choice)
        assert seen == [(1, "second 1", "first 1", 0, 3), (2, "first 2", "second 2", 1, 3), (4, "first 4", "second 4", 2, 3)]
        assert ballot.view() == {"phase": "judged", "judged": 3, "questions": 3}
        assert not ballot.vote(None, "A")
        assert ballot.undo()
        assert ballot.view()["number"] == 4
        ballot.end()
        ballot.end()
        assert ballot.view() == {"phase": "ended", "judged": 2, "questions": 3, "result": {"models": "told"}}
        assert not ballot.vote(4, "A")
        assert not ballot.undo()
    assert lines(tmp_path)[-1] == {"end": True}
    assert votes.choices == {1: "A", 2: "="}


def test_before_the_end_a_view_says_nothing_but_the_question(tmp_path):
    with open_votes(tmp_path, 4) as votes:
        ballot = Ballot(CARDS, votes, dict)
        for _ in CARDS:
            view = ballot.view()
            assert set(view) == {"phase", "judged", "questions", "number", "prompt", "language", "A", "B"}
            ballot.vote(view["number"], "A")
