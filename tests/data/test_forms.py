"""Every form of row tells the same dialogue; what is no preference is dropped or refused by name."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.forms import FORMS, recognised, to_preference
from rwkv_dpo.data.preference import Dropped, Preference, Ranking
from rwkv_dpo.data.prepare import prepare
from rwkv_dpo.data.prompts import MODES, render
from rwkv_dpo.data.splits import split_rows
from rwkv_dpo.data.tokenizer import WorldTokenizer


def said(*turns, names=("role", "content")):
    return [dict(zip(names, turn, strict=True)) for turn in turns]


def asked(*texts, user="user", assistant="assistant"):
    return [((user, assistant)[i % 2], text) for i, text in enumerate(texts)]


def ultrafeedback(turns, chosen, rejected):
    lead = asked(*turns)
    answers = (said(*lead, ("assistant", answer)) for answer in (chosen, rejected))
    return dict(zip(("prompt", "chosen", "rejected"), (turns[0], *answers), strict=True))


def trl_explicit(turns, chosen, rejected):
    answers = (said(("assistant", answer)) for answer in (chosen, rejected))
    return dict(zip(("prompt", "chosen", "rejected"), (said(*asked(*turns)), *answers), strict=True))


def trl_implicit(turns, chosen, rejected):
    return {key: value for key, value in ultrafeedback(turns, chosen, rejected).items() if key != "prompt"}


def trl_repeated(turns, chosen, rejected):
    return ultrafeedback(turns, chosen, rejected) | {"prompt": said(*asked(*turns))}


def sharegpt(turns, chosen, rejected):
    names = ("from", "value")
    return {
        "conversations": said(*asked(*turns, user="human", assistant="gpt"), names=names),
        "chosen": said(("gpt", chosen), names=names)[0],
        "rejected": said(("gpt", rejected), names=names)[0],
    }


def sharegpt_roles(turns, chosen, rejected):
    answers = (said(("assistant", answer)) for answer in (chosen, rejected))
    return dict(zip(("conversations", "chosen", "rejected"), (said(*asked(*turns)), *answers), strict=True))


def hh(turns, chosen, rejected):
    lead = "".join(f"\n\n{role}: {text}" for role, text in asked(*turns, user="Human", assistant="Assistant"))
    return {"chosen": f"{lead}\n\nAssistant: {chosen}", "rejected": f"{lead}\n\nAssistant: {rejected}"}


def hh_with_prompt(turns, chosen, rejected):
    whole = hh(turns, "", "")["chosen"].rstrip(" ")
    return {"prompt": whole, "chosen": " " + chosen, "rejected": " " + rejected}


def plain(turns, chosen, rejected):
    return {"prompt": turns[0], "chosen": chosen, "rejected": rejected}


def plain_reject(turns, chosen, rejected):
    return {"prompt": turns[0], "chosen": chosen, "reject": rejected}


WRITERS = {
    ultrafeedback: "ultrafeedback", trl_explicit: "trl", trl_implicit: "trl", trl_repeated: "trl", sharegpt: "sharegpt",
    sharegpt_roles: "sharegpt", hh: "hh", hh_with_prompt: "hh", plain: "plain", plain_reject: "plain",
}  # fmt: skip


def trl_implicit_text(turns, chosen, rejected):
    """Not among WRITERS: where its prompt ends is a guess, from what both texts begin with."""
    return {"chosen": turns[0] + chosen, "rejected": turns[0] + rejected}

TOKENIZER = WorldTokenizer()

# Not texts that a form itself would read as the start of another turn.
TEXT = st.text(max_size=40).filter(lambda text: not re.search("Human:|Assistant:", text))
ODD = st.sampled_from(["", " ", "\n\n", "\u2028", "\x00", "\ufeff", "e\u0301\u200d", "👩‍👧", "العربية", "{prompt}", "\\", "長い" * 3000])
DIALOGUES = st.lists(TEXT | ODD, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2 == 1)


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
@settings(max_examples=40)
@given(turns=DIALOGUES, chosen=TEXT | ODD, rejected=TEXT | ODD)
def test_every_form_tells_the_same_dialogue(write, turns, chosen, rejected):
    if write in (plain, plain_reject):
        turns = turns[:1]
    row = write(turns, chosen, rejected)
    told = to_preference(row, "row 1")
    if not row.get("rejected", row.get("reject")):
        assert told == Dropped("row 1", "no rejected answer")
    elif not row["chosen"]:
        assert told == Dropped("row 1", "empty answer")
    else:
        # A form may add or take outer space, which writing out removes.
        assert render(told, MODES["chat"], 0) == render(Preference("", "", tuple(turns), chosen, rejected), MODES["chat"], 0)
        assert told == to_preference(row, "row 1", WRITERS[write])


# Few prompts and answers, so that rows repeat and share them.
SOME = ODD | st.sampled_from(["Hi", "hi ", "HI", "a b", "a  b", "long " * 500])
ROWS = st.lists(st.tuples(st.sampled_from([*WRITERS, trl_implicit_text]), st.lists(SOME, min_size=1, max_size=3), SOME, SOME), max_size=8)


@settings(max_examples=60)
@given(rows=ROWS, ctx_len=st.integers(2, 64) | st.just(10**6), mode=st.sampled_from(list(MODES)), data=st.data())
def test_rows_of_all_forms_become_the_tokens_of_their_text_or_are_counted(rows, ctx_len, mode, data):
    # A dialogue of two turns would end with an answer.
    written = [write(turns if len(turns) % 2 else turns[:1], *answers) for write, turns, *answers in rows]
    read = [to_preference(row, f"row {i}") for i, row in enumerate(written)]
    prepared = prepare(read, TOKENIZER, ctx_len, mode, seed=0)
    pairs, report = prepared.pairs, prepared.report
    refused = dict(report.refused)
    assert report.n_read == len(rows) == report.n_kept + len(refused)
    assert len(pairs) == len(prepared.prompt_keys) == report.n_kept

    kept = [preference for preference in read if preference.where not in refused]
    seen = set()
    for i, preference in enumerate(kept):
        rendered = render(preference, MODES[mode], 0)
        texts = [TOKENIZER.decode(part.tolist()) for part in pairs.pair(i)]
        prompt, chosen, rejected = (part.tolist() for part in pairs.pair(i))
        assert preference.turns[-1].strip()
        assert preference.chosen.strip()
        assert preference.rejected.strip()
        assert chosen != rejected
        assert len(prompt) + max(len(chosen), len(rejected)) <= ctx_len
        seen.add((*prompt, -1, *chosen, -1, *rejected))
        if ctx_len == 10**6:
            assert texts == list(rendered[:3])
        else:
            # Prompts lose from their left, answers from their right.
            encoded = [TOKENIZER.encode(text) for text in rendered[:3]]
            assert encoded[0][len(encoded[0]) - len(prompt) :] == prompt
            assert [encoded[1][: len(chosen)], encoded[2][: len(rejected)]] == [chosen, rejected]
    assert len(seen) == len(kept)

    # Splits: every pair once, no prompt in two, and the same whatever the order of the rows.
    splits = split_rows(prepared.prompt_keys, 0.3, 0.3, seed=0)
    assert sorted(row for part in splits.values() for row in part) == list(range(len(pairs)))
    normal = [tuple(" ".join(turn.casefold().split()) for turn in preference.turns) for preference in kept]
    prompts = [{normal[row] for row in part} for part in splits.values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    as_tokens = [{pairs.pair(row)[0].tobytes() for row in part} for part in splits.values()]
    assert sum(map(len, as_tokens)) == len(set().union(*as_tokens))
    shuffled = prepare(data.draw(st.permutations(read)), TOKENIZER, ctx_len, mode, seed=0)
    assert lands_in(shuffled) == lands_in(prepared)
    assert shuffled.report.counts()["kept"] == report.n_kept


def lands_in(prepared):
    """The content of each split, whatever its order."""
    splits = split_rows(prepared.prompt_keys, 0.3, 0.3, seed=0)
    return {name: sorted([part.tolist() for part in prepared.pairs.pair(row)] for row in rows) for name, rows in splits.items()}


@given(st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "reject", "conversations", "system", "score_chosen", "score_rejected"]),
    st.recursive(
        st.none() | st.integers() | st.text(st.characters(), max_size=9) | st.just("\ud800"),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), inner | st.sampled_from(["user", "gpt"]), max_size=4),
        max_leaves=8,
    ),
), st.sampled_from(["auto", *FORMS]))  # fmt: skip
def test_rows_of_any_content_are_read_dropped_or_refused_in_one_line(row, form):
    try:
        told = to_preference(row, "row 1", form)
    except InputError as error:
        told = error
    assert isinstance(told, Preference | Ranking | Dropped) or "\n" not in str(told)


def test_system_messages_are_kept_wherever_they_stand():
    system = ("system", "Be kind.")
    whole = {name: said(system, ("user", "Hi"), ("assistant", name)) for name in ("chosen", "rejected")}
    rows = [
        whole,
        whole | {"prompt": "Hi"},
        {"prompt": said(system, ("user", "Hi")), **{name: said(("assistant", name)) for name in ("chosen", "rejected")}},
        {"system": "Be kind.", "prompt": "Hi", "chosen": "chosen", "rejected": "rejected"},
        {"conversations": said(system, ("user", "Hi")), "chosen": said(("gpt", "chosen")), "rejected": said(("gpt", "rejected"))[0]},
    ]
    for row in rows:
        assert to_preference(row, "row 1") == Preference("row 1", "Be kind.", ("Hi",), "chosen", "rejected")


@pytest.mark.parametrize(("chosen", "rejected", "prompt"), [
    ("The sky is blue.", "The sky is green.", "The sky is "),
    ("The sky is blue.", "The sky is black.", "The sky is "),
    ("The sky is", "The sky is grey", "The sky is"),
    ("天空是蓝色", "天空是绿色", "天空是"),
    ("Yes.", "No.", ""),
])  # fmt: skip
def test_an_implicit_prompt_of_text_ends_with_a_whole_word(chosen, rejected, prompt):
    told = to_preference({"chosen": chosen, "rejected": rejected}, "row 1")
    assert told == Preference("row 1", "", (prompt,), chosen.removeprefix(prompt), rejected.removeprefix(prompt))


@pytest.mark.parametrize(("change", "reason"), [
    ({"score_chosen": 7, "score_rejected": 7.0}, "tie"),
    ({"score_chosen": "7", "score_rejected": "7.0"}, "tie"),
    ({"score_chosen": 7, "score_rejected": 6}, None),
    ({"score_chosen": None, "score_rejected": None}, None),
    ({"score_chosen": "", "score_rejected": ""}, None),
    ({"rejected": None}, "no rejected answer"),
    ({"rejected": ""}, "no rejected answer"),
    ({"chosen": None}, "empty answer"),
])  # fmt: skip
def test_rows_without_a_preference_are_dropped_by_reason(change, reason):
    told = to_preference({"prompt": "p", "chosen": "c", "rejected": "r"} | change, "row 1")
    assert told == (Dropped("row 1", reason) if reason else Preference("row 1", "", ("p",), "c", "r"))


def test_dialogues_that_part_before_their_last_answer_are_dropped():
    long, short = hh(["1", "2", "3"], "4", "5")["chosen"], hh(["1"], "other", "")["chosen"]
    for chosen, rejected in ((long, short), (short, long)):
        assert to_preference({"chosen": chosen, "rejected": rejected}, "row 1") == Dropped("row 1", "answers of several turns")


U, A = ("user", "u"), ("assistant", "a")
DIALOGUE = {"chosen": said(U, A), "rejected": said(U, ("assistant", "b"))}
PLAIN = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize(("row", "fault"), [
    ({}, "has the columns none; a row has prompt text, chosen and rejected messages (ultrafeedback), or "),
    ({"question": "q", "chosen": "c"}, "has the columns 'question', 'chosen'; a row has"),
    (PLAIN | {"chosen": 3}, "field 'chosen' is a int; expected text"),
    (PLAIN | {"prompt": 3}, "field 'prompt' is a int; expected text or messages"),
    (PLAIN | {"prompt": ["p", "q"]}, "field 'prompt': message 1: expected a role and content, or from and value"),
    (PLAIN | {"prompt": "\ud800"}, "field 'prompt' has a lone surrogate at character 0"),
    (PLAIN | {"score_chosen": "good", "score_rejected": 1}, "field 'score_chosen' is 'good'; expected a number"),
    (DIALOGUE | {"chosen": said(U)}, "field 'chosen' ends with a message from the user; expected the assistant"),
    (DIALOGUE | {"rejected": said(U, A, U)}, "field 'rejected' ends with a message from the user; expected the assistant"),
    (DIALOGUE | {"rejected": said(("user", "v"), A)}, "fields 'chosen' and 'rejected' have different prompts: they part at message 1"),
    (DIALOGUE | {"prompt": "v"}, "field 'prompt' is none of the user's messages in 'chosen'"),
    ({"prompt": "p"} | dict.fromkeys(["chosen", "rejected"], said(("system", "s"), A)), "message 2 of the dialogue is from the system"),
    (DIALOGUE | {"rejected": "r"}, "field 'rejected' is a str; expected a list of messages"),
    (DIALOGUE | {"rejected": ["r"]}, "field 'rejected': message 1: expected a role and content, or from and value"),
    (DIALOGUE | {"chosen": said(U, ("judge", "t"), A)}, "field 'chosen': message 2: is from 'judge'; accepted are human, user"),
    (DIALOGUE | {"chosen": said(U, (["assistant"], "a"))}, "field 'chosen': message 2: is from ['assistant']"),
    (DIALOGUE | {"chosen": said(U, ("assistant", [{"type": "poem"}]))}, "field 'chosen': message 2: field 'content' has a part that is"),
    ({"conversations": said(U, A), "chosen": said(A)[0], "rejected": said(A)[0]}, "message 3 of the dialogue is from the assistant; exp"),
    ({"conversations": [], "chosen": said(A)[0], "rejected": said(A)[0]}, "message 1 of the dialogue is from the assistant; expected"),
    ({"conversations": said(U, U), "chosen": said(A)[0], "rejected": said(A)[0]}, "message 2 of the dialogue is from the user; expec"),
    ({"conversations": "hi", "chosen": said(A)[0], "rejected": said(A)[0]}, "field 'conversations' is a str; expected a list of messages"),
    (hh(["h"], "a", "b") | {"rejected": "b"}, "field 'rejected' has no Human: and Assistant: turns"),
])  # fmt: skip
def test_a_bad_row_is_refused_with_its_field(row, fault):
    with pytest.raises(InputError, match=re.escape(fault)):
        to_preference(row, "row 1")


def test_a_named_form_is_honoured_or_refused():
    row = hh(["h"], "a", "b")
    assert recognised(row) == "hh"
    assert to_preference(row, "row 1", "trl").turns == ("\n\nHuman: h\n\nAssistant: ",)
    with pytest.raises(InputError, match=r"has the columns 'chosen', 'rejected'; --format plain is for prompt, chosen and"):
        to_preference(row, "row 1", "plain")
