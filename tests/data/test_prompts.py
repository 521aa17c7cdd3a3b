"""How preferences read once they are written out."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.data.prompts import clean, render, seeded_fraction
from rwkv_dpo.data.sources import Preference


def single(prompt="Why?", chosen="Because.", rejected="No."):
    return Preference("row 1", "", (prompt,), chosen, rejected)


def test_a_single_turn_is_written_in_one_of_the_originals_templates():
    written = {render(single(), "mix", seed).prompt for seed in range(200)}
    assert written == {"User: Why?\n\nAssistant:", "Question: Why?\n\nAnswer:", "Input: Why?\n\nResponse:"}
    assert render(single(), "mix", 0)[1:] == (" Because.\n\n", " No.\n\n")


def test_templates_are_drawn_with_their_weights():
    n = 4000
    counts = Counter(render(single(f"Question {i}"), "mix", seed=1).prompt.split(":")[0] for i in range(n))
    for word, weight in (("User", 0.8), ("Question", 0.1), ("Input", 0.1)):
        # Five standard deviations of a binomial count.
        assert abs(counts[word] - n * weight) < 5 * (n * weight * (1 - weight)) ** 0.5


def test_dialogues_and_system_messages_are_written_as_chat_in_both_modes():
    preference = Preference("row 1", " Be brief.\n\n\nBe kind. ", ("Hi", " Hello!\r\n\r\nYou? ", "Fine"), "Good.", "Bad.")
    for mode in ("mix", "chat"):
        assert render(preference, mode, 0).prompt == (
            "System: Be brief.\nBe kind.\n\nUser: Hi\n\nAssistant: Hello!\nYou?\n\nUser: Fine\n\nAssistant:"
        )


def test_chat_mode_writes_every_single_turn_the_same_way():
    assert {render(single(), "chat", seed).prompt for seed in range(50)} == {"User: Why?\n\nAssistant:"}


def test_braces_in_a_prompt_are_text():
    assert "{prompt} {0}" in render(single("{prompt} {0}"), "mix", 0).prompt


@pytest.mark.parametrize("answer", ["", "  ", "\n\n"])
def test_an_answer_without_text_is_empty(answer):
    assert render(single(chosen=answer), "mix", 0).chosen == ""


@given(st.text(alphabet="a \t\r\n\u2028é", max_size=30))
def test_clean_text_has_no_empty_line_and_no_outer_space(text):
    cleaned = clean(text)
    assert "\n\n" not in cleaned
    assert "\r" not in cleaned
    assert cleaned == cleaned.strip() == clean(cleaned)
    assert cleaned.replace("\n", "").replace(" ", "") == text.strip().replace("\r", "").replace("\n", "").replace(" ", "")


@given(st.text(), st.integers())
def test_fractions_are_in_the_half_open_unit_interval(text, seed):
    assert 0 <= seeded_fraction("purpose", seed, text) < 1
