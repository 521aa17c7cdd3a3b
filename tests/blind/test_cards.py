"""Questions, answers of files, and the draw of sides."""

import json
import math
from collections import Counter

import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.blind.cards import Card, Question, deal, read_answers, read_cards, read_questions, write_cards

OWN = read_questions(None)
ANSWERS = [["first"] * len(OWN), ["second"] * len(OWN)]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_our_own_questions_are_of_six_kinds_in_two_languages():
    assert len(OWN) >= 60
    kinds = Counter((one.kind, one.language) for one in OWN)
    assert len({kind for kind, _ in kinds}) == 6
    assert {language for _, language in kinds} == {"en", "zh"}
    assert len(kinds) == 12
    assert max(kinds.values()) == min(kinds.values())
    assert len({one.prompt for one in OWN}) == len(OWN)
    for one in OWN:
        has_chinese = any("\u4e00" <= character <= "\u9fff" for character in one.prompt)
        assert has_chinese == (one.language == "zh"), one


def test_questions_of_a_file_come_in_its_order_and_each_once(tmp_path):
    (tmp_path / "q.txt").write_text("\ufeffWhy?\n\n  天空\n Why?\n", "utf-8")
    assert read_questions(tmp_path / "q.txt") == [Question("Why?"), Question("天空")]
    path = write(tmp_path / "q.jsonl", {"prompt": "a\u2028b", "kind": "x", "language": 3}, {"prompt": "c"})
    assert read_questions(path) == [Question("a\u2028b", "x"), Question("c")]


def test_sides_and_order_are_drawn_evenly_and_of_each_other_and_the_models_independently():
    n = 400
    swapped, first_half, both = 0, 0, 0
    for seed in range(n):
        cards = deal(OWN, ANSWERS, seed)
        assert {card.question for card in cards} == set(OWN)
        at = next(i for i, card in enumerate(cards) if card.question == OWN[0])
        swapped += sum(card.sides == (1, 0) for card in cards)
        first_half += at < len(OWN) / 2
        both += (at < len(OWN) / 2) == (cards[at].sides == (1, 0))
    for hits, draws in ((swapped, n * len(OWN)), (first_half, n), (both, n)):
        # Five standard deviations of a fair coin; the draws are hashes, the same on every machine.
        assert abs(hits - draws / 2) < 5 * math.sqrt(draws) / 2


def test_a_draw_depends_on_the_seed_and_the_question_alone():
    of = {card.question: card.sides for card in deal(OWN, ANSWERS, 3)}
    assert {card.question: card.sides for card in deal(OWN[::-2], [["x"] * 36, ["y"] * 36], 3)}.items() <= of.items()
    assert {card.question: card.sides for card in deal(OWN, ANSWERS, 4)} != of


def test_cards_are_kept(tmp_path):
    assert read_cards(tmp_path) == []
    cards = deal([Question("a\u2028b", "x", "en"), Question("天")], [["1\n2", ""], ["2", "\u0085"]], 0)
    write_cards(tmp_path, cards)
    assert read_cards(tmp_path) == cards
    for line in ("{", "[]", '{"prompt": "a", "kind": "", "language": "", "answers": ["a"], "sides": [0, 1]}',
                 '{"prompt": "a", "kind": "", "language": "", "answers": ["a", "b"], "sides": [0, 0]}',
                 '{"prompt": 1, "kind": "", "language": "", "answers": ["a", "b"], "sides": [0, 1]}'):  # fmt: skip
        (tmp_path / "answers.jsonl").write_text(line + "\n")
        with pytest.raises(InputError, match=r"answers\.jsonl: line 1: no question with two answers"):
            read_cards(tmp_path)


def test_answers_of_two_files_meet_by_their_prompts(tmp_path):
    first = write(tmp_path / "a.jsonl", {"prompt": "x", "answers": ["ax", "more"]}, {"prompt": "y", "answers": [" ay "], "kind": "k"})
    second = write(tmp_path / "b.txt", {"prompt": "y", "answers": ["by"]}, {"prompt": "x", "answers": [""]})
    questions, answers = read_answers([first, second])
    assert questions == [Question("x"), Question("y", "k")]
    assert answers == [["ax", "ay"], ["", "by"]]
    assert Card(questions[0], ("ax", ""), (1, 0)).side("A") == ""


@pytest.mark.parametrize(("rows", "told"), [
    (({"prompt": "x", "answers": ["a"]}, {"prompt": "z", "answers": ["a"]}), r"b\.jsonl: line 2: .*a\.jsonl has no such prompt: 'z'"),
    (({"prompt": "y", "answers": ["a"]},), r"a\.jsonl: line 1: .*b\.jsonl has no such prompt: 'x'"),
    (({"prompt": "x", "answers": ["a"]}, {"prompt": "x", "answers": ["a"]}), r"b\.jsonl: line 2: the prompt stands there a second time"),
    (({"prompt": "x", "answers": []},), r"b\.jsonl: line 1: has no text in a list 'answers'"),
    (({"prompt": "x", "answers": "a"},), r"b\.jsonl: line 1: has no text in a list 'answers'"),
    (({"prompt": "x", "answers": ["\ud800"]},), r"b\.jsonl: line 1: has no text in a list 'answers'"),
    (({"prompt": "\ud800", "answers": ["a"]},), r"b\.jsonl: line 1: has no text in a field 'prompt'"),
    ((3,), r"b\.jsonl: line 1: has no text in a field 'prompt'"),
])  # fmt: skip
def test_answers_that_do_not_meet_are_named_by_file_and_line(tmp_path, rows, told):
    first = write(tmp_path / "a.jsonl", {"prompt": "x", "answers": ["ax"]})
    with pytest.raises(InputError, match=f"^--answers .*{told}"):
        read_answers([first, write(tmp_path / "b.jsonl", *rows)])
