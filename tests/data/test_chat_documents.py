"""Chat data as documents: told by columns, written as the pairs' templates write a dialogue, or refused."""

import json

import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.chat_documents import document_of
from rwkv_dpo.data.documents import open_documents
from rwkv_dpo.data.forms import to_preference
from rwkv_dpo.data.preference import Preference
from rwkv_dpo.data.prompts import MODES, render


def said(*messages, names=("role", "content")):
    return [dict(zip(names, message, strict=True)) for message in messages]


DIALOGUE = "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello!\nYou?\n\nUser: Fine.\n\nAssistant: Good.\n\n"
TURNS = ("system", "Be kind."), ("user", " Hi\n"), ("assistant", "Hello!\n\nYou?"), ("user", "Fine."), ("assistant", "Good.")
SAID = "Hi", "Hello!\nYou?", "Fine.", "Good."
FROM = ("from", "value")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": said(*TURNS)},
        {"messages": said(*TURNS[1:]), "system": "Be kind.", "id": 7},
        {"conversations": said(*((role.upper(), text) for role, text in TURNS), names=FROM)},
        {"conversations": said(*zip(("human", "gpt", "Human", "bot"), SAID, strict=True), names=FROM), "system": "Be kind."},
        {"instruction": "Fine.", "input": "", "output": "Good.", "history": [["Hi", "Hello!\nYou?"]], "system_prompt": "Be kind."},
        {"prompt": said(*TURNS[:-1]), "completion": said(TURNS[-1])},
        {"prompt": said(*TURNS[:-1]), "completion": "Good."},
    ],
)
def test_every_form_of_a_dialogue_is_the_same_document(row):
    assert document_of(row, "", "row 1") == DIALOGUE


def test_it_is_what_a_preference_of_the_same_turns_would_be():
    system, *turns, answer = (text for _, text in TURNS)
    written = render(Preference("", system, tuple(turns), answer, "No."), MODES["chat"], seed=3)
    assert document_of({"messages": said(*TURNS)}, "", "row 1") == written.prompt + written.chosen


@pytest.mark.parametrize("asked", ["instruction", "prompt", "question", "query"])
@pytest.mark.parametrize("answered", ["output", "response", "completion", "answer"])
def test_a_question_and_its_answer(asked, answered):
    assert document_of({asked: "Q?", answered: "A."}, "", "row 1") == "User: Q?\n\nAssistant: A.\n\n"
    # As tables pad rows: another form's columns, with nothing in them.
    assert document_of({"text": None, "messages": None, asked: "Q?", answered: "A."}, "", "row 1") == "User: Q?\n\nAssistant: A.\n\n"


@pytest.mark.parametrize("beside", [{}, {"context": "C."}, {"input": "I."}, {"history": [["a", "b"]]}, {"system_prompt": "S."}])
def test_what_stands_beside_a_question_is_put_where_pairs_have_it(beside):
    pair = to_preference({"instruction": "Q?", **beside, "chosen": "A.", "rejected": "B."}, "row 1")
    written = render(pair, MODES["chat"], seed=0)
    assert document_of({"instruction": "Q?", **beside, "output": "A."}, "", "row 1") == written.prompt + written.chosen


def test_a_text_or_the_field_that_is_named_stays_as_it_is():
    row = {"text": " a\n\nb ", "prompt": "Q", "completion": "A"}
    assert document_of(row, "", "row 1") == " a\n\nb "
    assert document_of(row, "completion", "row 1") == "A"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "b"}, "no field 'text', found 'body'; expected field 'text', or chat data: conversations or"),
        ({}, "no field 'text', found none"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "no field 'text', found 'prompt', 'chosen', 'rejected'"),
        ({"messages": "Hi"}, "field 'messages' is a str; expected a list of messages"),
        ({"messages": [{"role": "user"}]}, "field 'messages': message 1: expected a role and content, or from and value"),
        ({"messages": said(("user", "a"), ("tool", "b"))}, "tool turns, which the chat template cannot express"),
        ({"messages": said(("user", "a"), ("user", "b"))}, "message 2 of the dialogue is from the user; expected the assistant"),
        ({"messages": said(("system", "s"), ("assistant", "b"))}, "message 2 of the dialogue is from the assistant; expected the user"),
        ({"messages": said(("user", "a"))}, "the dialogue ends with a message from the user; expected one from the assistant"),
        ({"messages": []}, "the dialogue ends with no message"),
        ({"messages": said(("user", "a"), ("assistant", 7))}, "field 'messages': message 2: field 'content' is a int; expected text"),
        ({"messages": said(("user", "a"), ("assistant", " "))}, "the last answer is empty"),
        ({"prompt": "p", "output": 5}, "field 'output' is a int; expected text or messages"),
        ({"prompt": "p", "output": "a", "history": ["x"]}, "field 'history' is a list; expected text"),
        ({"prompt": "p", "output": "a", "history": [["x", None]]}, "field 'history': message 1: expected a role and content"),
    ],
)
def test_a_row_that_is_no_dialogue_is_refused_with_what_it_has(row, message):
    with pytest.raises(InputError, match=f"row 1: {message}"):
        document_of(row, "", "row 1")


def test_faulty_rows_are_left_out_when_asked_and_cells_hold_messages(tmp_path):
    lines = [{"messages": said(*TURNS)}, {"messages": said(("user", "a"))}, {"instruction": "Q?", "output": "A."}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    faults: list[InputError] = []
    assert list(open_documents(str(tmp_path / "a.jsonl"), on_fault=faults.append)) == [DIALOGUE, "User: Q?\n\nAssistant: A.\n\n"]
    assert len(faults) == 1
    (tmp_path / "a.csv").write_text('messages;n\n"' + str(said(*TURNS)).replace('"', '""') + '";1\n')
    assert list(open_documents(str(tmp_path / "a.csv"))) == [DIALOGUE]
