"""How preferences read once they are written out."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.preference import Preference
from rwkv_dpo.data.prepare import prepare
from rwkv_dpo.data.prompts import MODES, clean, load_templates, render, seeded_fraction
from rwkv_dpo.data.tokenizer import WorldTokenizer

MIX, CHAT = MODES["mix"], MODES["chat"]


def single(prompt="Why?", chosen="Because.", rejected="No."):
    return Preference("row 1", "", (prompt,), chosen, rejected)


def test_a_single_turn_is_written_in_one_of_the_originals_templates():
    written = {render(single(), MIX, seed).prompt for seed in range(200)}
    assert written == {"User: Why?\n\nAssistant:", "Question: Why?\n\nAnswer:", "Input: Why?\n\nResponse:"}
    assert render(single(), MIX, 0)[1:3] == (" Because.\n\n", " No.\n\n")


def test_templates_are_drawn_with_their_weights():
    n = 4000
    counts = Counter(render(single(f"Question {i}"), MIX, seed=1).prompt.split(":")[0] for i in range(n))
    for word, weight in (("User", 0.8), ("Question", 0.1), ("Input", 0.1)):
        # Five standard deviations of a binomial count.
        assert abs(counts[word] - n * weight) < 5 * (n * weight * (1 - weight)) ** 0.5


def test_dialogues_and_system_messages_are_written_as_chat_in_both_modes():
    preference = Preference("row 1", " Be brief.\n\n\nBe kind. ", ("Hi", " Hello!\r\n\r\nYou? ", "Fine"), "Good.", "Bad.")
    for mode in (MIX, CHAT):
        assert render(preference, mode, 0).prompt == (
            "System: Be brief.\nBe kind.\n\nUser: Hi\n\nAssistant: Hello!\nYou?\n\nUser: Fine\n\nAssistant:"
        )


def test_chat_mode_writes_every_single_turn_the_same_way():
    assert {render(single(), CHAT, seed).prompt for seed in range(50)} == {"User: Why?\n\nAssistant:"}


# By the names of a template and of the answers' form: the end of the prompt, and both answers. Prompts end in the forms that G1 models are
# said to know: "Assistant:", "Assistant: <think", and "Assistant: <think>\n</think" for none. That a line break follows an empty span is
# our choice.
G1 = {
    ("g1", "plain"): ("Assistant:", " Yes.\n\nIndeed.\n\n", " No.\n\n"),
    ("g1", "thinking"): ("Assistant: <think", ">Hm.\n\nSo.</think>\nYes.\n\n", "></think>No.\n\n"),
    ("g1", "mixed"): ("Assistant:", " <think>Hm.</think>Yes.\n\n", " No.\n\n"),
    ("g1-think", "plain"): ("Assistant: <think>\n</think", ">\nYes.\n\nIndeed.\n\n", ">\nNo.\n\n"),
    ("g1-think", "thinking"): ("Assistant: <think", ">Hm.\n\nSo.</think>\nYes.\n\n", "></think>No.\n\n"),
    ("g1-think", "mixed"): ("Assistant: <think", ">Hm.</think>Yes.\n\n", ">\n</think>\nNo.\n\n"),
}
G1_ANSWERS = {
    "plain": ("Yes.\r\n\r\nIndeed. ", "No."), "thinking": ("<think>Hm.\n\nSo.</think>\nYes.", "<think></think>No."),
    "mixed": ("<think>Hm.</think>Yes.", "No."),
}  # fmt: skip


@pytest.mark.parametrize(("name", "answers"), G1)
def test_g1_models_are_asked_and_answer_in_the_form_they_were_trained_in(name, answers):
    preference = Preference("row 1", "", ("Why?\n\n\nTell.",), *G1_ANSWERS[answers])
    end, *texts = G1[name, answers]
    assert render(preference, MODES[name], 0) == (f"User: Why?\nTell.\n\n{end}", *texts, f"\n\n{end}")
    assert render(single(chosen=" "), MODES[name], 0).chosen == ""


def test_answers_of_a_ranking_that_think_and_others_have_prompts_of_their_own():
    rows = [Preference("row 1", "", ("Why?",), "<think>a</think>b", "<think>c</think>d", ranking="1"),
            Preference("row 2", "", ("Why?",), "<think>a</think>b", "e", ranking="1")]  # fmt: skip
    pairs = prepare(rows, WorldTokenizer(), 100, "g1", 0).pairs
    assert [WorldTokenizer().decode(part.tolist()) for i in range(2) for part in pairs.pair(i)] == [
        "User: Why?\n\nAssistant: <think", ">a</think>b\n\n", ">c</think>d\n\n",
        "User: Why?\n\nAssistant:", " <think>a</think>b\n\n", " e\n\n",
    ]  # fmt: skip


def test_braces_in_a_prompt_are_text():
    assert "{prompt} {0}" in render(single("{prompt} {0}"), MIX, 0).prompt


@pytest.mark.parametrize("answer", ["", "  ", "\n\n"])
def test_an_answer_without_text_is_empty(answer):
    assert render(single(chosen=answer), MIX, 0).chosen == ""


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


def test_the_cue_is_what_follows_the_last_turn():
    for templates in (MIX, CHAT):
        for seed in range(40):
            rendered = render(single(), templates, seed)
            assert rendered.prompt.endswith(f"Why?{rendered.cue}")


def test_a_text_file_is_a_template_of_single_turns(tmp_path):
    (tmp_path / "own.txt").write_text("### {prompt} {0} ###\n\n", "utf-8")
    templates = load_templates(str(tmp_path / "own.txt"))
    assert render(single("a {prompt}"), templates, 0)[:2] == ("### a {prompt} {0} ###\n", " Because.\n\n")
    dialogue = Preference("row 1", "", ("1", "2", "3"), "c", "r")
    assert render(dialogue, templates, 0).prompt == render(dialogue, CHAT, 0).prompt


def test_a_json_file_sets_weights_names_and_answers(tmp_path):
    settings = {"single": {"A {prompt}": 3, "B {prompt}": 1}, "user": "Human", "assistant": "Bot", "system": "S", "answer": "<{answer}>"}
    (tmp_path / "own.json").write_text(json.dumps(settings), "utf-8")
    templates = load_templates(str(tmp_path / "own.json"))
    assert render(Preference("row 1", "s", ("1", "2", "3"), "c", "r"), templates, 0) == (
        "S: s\n\nHuman: 1\n\nBot: 2\n\nHuman: 3\n\nBot:", "<c>", "<r>", "\n\nBot:"
    )  # fmt: skip
    n = 2000
    n_first = sum(render(single(f"Question {i}"), templates, 0).prompt.startswith("A") for i in range(n))
    # Five standard deviations of a binomial count.
    assert abs(n_first - 0.75 * n) < 5 * (n * 0.75 * 0.25) ** 0.5


@pytest.mark.parametrize(("name", "content", "fault"), [
    ("mixed", None, "accepted are mix, chat, g1, g1-think, and a .txt or .json file"),
    ("none.txt", None, "cannot be read: No such file"),
    ("a.txt", b"User: {promt}", r"'User: \{promt\}' has \{prompt\} 0 times"),
    ("a.txt", b"{prompt}{prompt}", r"has \{prompt\} 2 times"),
    ("a.txt", b"\xff{prompt}", "not UTF-8: invalid start byte at byte 0"),
    ("a.json", b"{", "not JSON"),
    ("a.json", b"[]", "expected an object, found list"),
    ("a.json", b'{"users": "U"}', "unknown field 'users'; accepted are single, system, user, assistant, answer"),
    ("a.json", b'{"name": "U"}', "unknown field 'name'"),
    ("a.json", b'{"single": {"{prompt}": 0}}', "field 'single' is an object of templates and their weights"),
    ("a.json", b'{"single": ["{prompt}"]}', "field 'single' is an object of templates"),
    ("a.json", b'{"user": ""}', "field 'user' is ''; expected text"),
    ("a.json", b'{"answer": "a"}', r"field 'answer' is 'a'; expected \{answer\} in it, once"),
])  # fmt: skip
def test_bad_templates_are_refused_by_name(tmp_path, monkeypatch, name, content, fault):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=fault) as caught:
        load_templates(name)
    assert str(caught.value).startswith(f"--templates {name}: ")
