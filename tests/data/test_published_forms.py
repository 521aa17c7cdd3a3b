"""Rows as published sets have them, in our own words: each ends in the turns and answers that the set's documentation gives it."""

import re
from pathlib import Path

import pytest
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.chat_marks import WRAPPED
from rwkv_dpo.data.columns import parse_columns, renamed
from rwkv_dpo.data.forms import FORMS, recognised, to_preference
from rwkv_dpo.data.messages import IMAGES
from rwkv_dpo.data.preference import Dropped, Notes, Preference, Ranking
from rwkv_dpo.data.rated_rows import UNSCORED


def user(text, **more):
    return {"role": "user", "content": text, **more}


def bot(text, **more):
    return {"role": "assistant", "content": text, **more}


def pair(*turns, system="", chosen="good", rejected="bad"):
    return Preference("row 1", system, turns, chosen, rejected)


def ranking(answers, scores, *turns, system="", is_part=False):
    return Ranking("row 1", system, turns, tuple(answers), tuple(map(float, scores)), is_part)


BOTH = {"chosen": "good", "rejected": "bad"}
AS_MESSAGES = {"chosen": [bot("good")], "rejected": [bot("bad")]}
WHOLE = {"chosen": [user("Why?"), bot("good")], "rejected": [user("Why?"), bot("bad")]}


def completion(text, *ratings, **more):
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {
        "model": "m", "principle": "honesty", "custom_system_prompt": "Be honest.", "response": text, "critique": "...",
        "annotations": {name: {"Rating": rating, "Rationale": "..."} for name, rating in zip(aspects, ratings, strict=True)}, **more,
    }  # fmt: skip


PUBLISHED = {
    # Pairs
    "orca_dpo_pairs": ({"system": "Be kind.", "question": "Why?", **BOTH}, "orca", pair("Why?", system="Be kind.")),
    "orca_dpo_pairs, CSV without a system": ({"system": "", "question": "Why?", **BOTH}, "orca", pair("Why?")),
    "distilabel-intel-orca": (
        {"system": "Be kind.", "input": "Why?", **BOTH, "generations": ["good", "bad"], "order": ["a", "b"], "rating": [9.0, 7.0],
         "chosen_score": 9.0, "status": "unchanged"}, "orca", pair("Why?", system="Be kind.")),
    "ultrafeedback-binarized-preferences": (
        {"instruction": "Why?", "chosen_response": "good", "rejected_response": "bad", "chosen_avg_rating": 4.5,
         "rejected_avg_rating": 2.0}, "alpaca", pair("Why?")),
    "ultrafeedback-binarized-preferences-cleaned": (
        {"source": "s", "prompt": "Why?", **WHOLE, "chosen-rating": 5.0, "rejected-rating": 3.0, "chosen-model": "m"},
        "ultrafeedback", pair("Why?")),
    "ultrafeedback_binarized": (
        {"prompt": "Why?", "prompt_id": "1f", **WHOLE, "messages": WHOLE["chosen"], "score_chosen": 8.0, "score_rejected": 4.0},
        "ultrafeedback", pair("Why?")),
    "llama3-ultrafeedback": (
        {"prompt": "Why?", "all_generated_responses": ["bad", "good"], "all_rm_scores": [0.1, 0.2], **WHOLE},
        "ultrafeedback", pair("Why?")),
    "orpo-dpo-mix": ({"source": "s", **WHOLE, "prompt": "Why?", "question": ""}, "ultrafeedback", pair("Why?")),
    "capybara-dpo": (
        {"source": "s", "conversation": [{"input": "Hi", "output": "Hello"}, {"input": "Why?", "output": "good"}],
         "original_response": "good", "chosen": [user("Hi"), bot("Hello"), user("Why?"), bot("good")],
         "rejected": [user("Hi"), bot("Hello"), user("Why?"), bot("bad")], "rating_chosen": 5, "rating_rejected": 4},
        "sharegpt", pair("Hi", "Hello", "Why?")),
    "Alpaca preferences": ({"instruction": "Add.", "input": "1 2", **BOTH}, "alpaca", pair("Add.\n1 2")),
    "Alpaca preferences with a list": (
        {"instruction": "Add.", "input": "1 2", "output": ["good", "bad"], "history": [["Hi", "Hello"]]},
        "alpaca", pair("Hi", "Hello", "Add.\n1 2")),
    "Alpaca preferences with a list in a cell of text": (
        {"instruction": "Add.", "input": "", "output": "['good', 'bad']"}, "alpaca", pair("Add.")),
    "LLaMA-Factory sharegpt": (
        {"conversations": [{"from": "human", "value": "Why?"}], "system": "Be kind.", "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}}, "sharegpt", pair("Why?", system="Be kind.")),
    "conversations and texts": ({"conversations": [{"from": "human", "value": "Why?"}], **BOTH}, "sharegpt", pair("Why?")),
    "messages and texts": ({"messages": [user("Why?")], **BOTH}, "sharegpt", pair("Why?")),
    "OpenAI": (
        {"input": {"messages": [user("Why?")], "tools": [], "parallel_tool_calls": True}, "preferred_output": [bot("good")],
         "non_preferred_output": [bot("bad")]}, "openai", pair("Why?")),
    "ms-swift": ({"messages": [user("Why?"), bot("good")], "rejected_response": "bad"}, "swift", pair("Why?")),
    "ms-swift with a dialogue": (
        {"messages": [user("Why?"), bot("good")], "rejected_messages": [user("Why?"), bot("bad")]}, "swift", pair("Why?")),
    "one message each": ({"prompt": "Why?", "chosen": bot("good"), "rejected": bot("bad")}, "ultrafeedback", pair("Why?")),
    "lists of one text": ({"prompt": "Why?", "chosen": ["good"], "rejected": ["bad"]}, "plain", pair("Why?")),
    "lists of texts": (
        {"prompt": "Why?", "chosen": ["good", "fine"], "rejected": ["bad"]}, "plain", ranking(["good", "fine", "bad"], [1, 1, 0], "Why?")),
    "HelpSteer3, edits": (
        {"context": [user("Why?")], "original_response": "so so", "good_edited_response": "good", "bad_edited_response": "bad"},
        "orca", pair("Why?")),
    "names and nulls of parquet": (
        {"prompt": None, "question": None, "chosen": [user("Why?", name="Ann", tool_calls=None, **{"from": None}), bot("good")],
         "rejected": [user("Why?", name="Ann"), bot("bad")], "label": None, "messages": None}, "trl", pair("Why?")),
    # Two answers
    "HelpSteer2-preference": (
        {"split": "train", "prompt": "Why?", "response_1": "bad", "response_2": "good", "preference_strength": 2,
         "preference_statement": "@Response 2 is better"}, "helpsteer2_preference", ranking(["bad", "good"], [0, 2], "Why?")),
    "HelpSteer2-preference of several turns": (
        {"prompt": "Hi\n\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nWhy?", "response_1": "good", "response_2": "bad",
         "preference_strength": -1}, "helpsteer2_preference", ranking(["good", "bad"], [0, -1], "Hi", "Hello", "Why?")),
    "HelpSteer3": (
        {"domain": "general", "language": "english", "context": [user("Hi"), bot("Hello"), user("Why?")], "response1": "good",
         "response2": "bad", "overall_preference": -3}, "helpsteer3", ranking(["good", "bad"], [0, -3], "Hi", "Hello", "Why?")),
    "SHP": (
        {"post_id": "x", "history": "Why?", "human_ref_A": "good", "human_ref_B": "bad", "labels": 1, "score_A": 12, "score_B": 4,
         "score_ratio": 3.0}, "shp", ranking(["good", "bad"], [12, 4], "Why?")),
    "PKU-SafeRLHF": (
        {"prompt": "Why?", "response_0": "bad", "response_1": "good", "is_response_0_safe": True, "better_response_id": 1,
         "safer_response_id": 0}, "safe_rlhf", ranking(["bad", "good"], [0, 1], "Why?")),
    "webgpt_comparisons": (
        {"question": {"dataset": "eli5", "id": "1", "full_text": "Why?"}, "quotes_0": {"title": []}, "answer_0": "good", "score_0": 0.5,
         "answer_1": "bad", "score_1": -0.5}, "webgpt", ranking(["good", "bad"], [0.5, -0.5], "Why?")),
    "summarize_from_feedback": (
        {"info": {"id": "t3", "post": "A story.", "title": "My day", "subreddit": "tales", "site": None, "article": None},
         "summaries": [{"text": "bad", "policy": "sup"}, {"text": "good", "policy": "ref"}], "choice": 1, "worker": "w"},
        "summaries", ranking(["bad", "good"], [0, 1], "SUBREDDIT: r/tales\n\nTITLE: My day\n\nPOST: A story.\n\nTL;DR:")),
    "summarize_from_feedback, news": (
        {"info": {"article": "News.", "post": None}, "summaries": [{"text": "good"}, {"text": "bad"}], "choice": 0},
        "summaries", ranking(["good", "bad"], [1, 0], "News.\n\nTL;DR:")),
    "chatbot_arena_conversations": (
        {"model_a": "a", "model_b": "b", "winner": "model_b", "conversation_a": [user("Why?"), bot("bad")],
         "conversation_b": [user("Why?"), bot("good")]}, "arena", ranking(["bad", "good"], [0, 1], "Why?")),
    # Many answers
    "UltraFeedback": (
        {"source": "s", "instruction": "Why?", "models": ["a", "b", "c", "d"], "correct_answers": ["None"], "completions": [
            completion("one", "5", "5", "4", "5", overall_score=2.0), completion("two", "1", "N/A", "2", "3", overall_score=10.0),
            completion("three", "N/A", "N/A", "N/A", "N/A", overall_score=7.5),
            completion("four", "1", "1", "1", "1", overall_score=10.0, **{"fine-grained_score": 1.25})]},
        "ranked", ranking(["one", "two", "three", "four"], [4.75, 2, 7.5, 1.25], "Why?")),
    "Nectar": (
        {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: ", "turns": 2, "num_responses": 3, "good_natured": True,
         "answers": [{"answer": f"a{rank}", "model": "m", "rank": float(rank)} for rank in (2, 1, 3)]},
        "ranked", ranking(["a2", "a1", "a3"], [-2, -1, -3], "Hi", "Hello", "Why?")),
    "responses and scores": (
        {"prompt": "Why?", "responses": ["a", "b"], "scores": [0.5, 1]}, "ranked", ranking(["a", "b"], [0.5, 1], "Why?")),
    "responses and ranks in cells of text": (
        {"question": "Why?", "responses": '["a", "b"]', "rank": "[1, 2]"}, "ranked", ranking(["a", "b"], [-1, -2], "Why?")),
    "generations as messages": (
        {"messages": [user("Why?")], "generations": [[bot("a")], [bot("b")]], "ratings": ["3", "4"]},
        "ranked", ranking(["a", "b"], [3, 4], "Why?")),
    # One answer a row
    "HelpSteer": (
        {"prompt": "Why?", "response": "a", "helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2},
        "rated", ranking(["a"], [3], "Why?", is_part=True)),
    "KTO of TRL": ({"prompt": "Why?", "completion": "a", "label": True}, "kto", ranking(["a"], [1], "Why?", is_part=True)),
    "KTO of TRL with messages": (
        {"prompt": [user("Why?")], "completion": [bot("a")], "label": False}, "kto", ranking(["a"], [0], "Why?", is_part=True)),
    "KTO of ms-swift": ({"messages": [user("Why?"), bot("a")], "label": True}, "kto", ranking(["a"], [1], "Why?", is_part=True)),
    "KTO of LLaMA-Factory": (
        {"instruction": "Why?", "input": "", "output": "a", "kto_tag": "False"}, "kto", ranking(["a"], [0], "Why?", is_part=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_row_is_told_by_its_columns_and_read_right(name):
    row, form, expected = PUBLISHED[name]
    told = to_preference(row, "row 1")
    assert told == expected
    assert recognised(renamed(row, {})) == form
    if form not in ("plain", "trl"):
        assert to_preference(row, "row 1", form) == expected


def test_the_documentation_lists_every_form():
    listed = re.findall(r"^\| `(\w+)` \|", (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8"), re.MULTILINE)
    assert set(listed) >= set(FORMS)


def test_every_form_has_a_row_here_or_in_the_other_test():
    assert {form for _, form, _ in PUBLISHED.values()} | {"hh"} == set(FORMS)


@pytest.mark.parametrize("name", [name for name, (_, form, _) in PUBLISHED.items() if form in ("orca", "alpaca")])
def test_a_question_column_is_the_prompt_and_not_what_both_answers_begin_with(name):
    row, _, expected = PUBLISHED[name]
    row = {key: f"The {value}" if value in ("good", "bad") else value for key, value in row.items()}
    if "output" not in row:
        assert to_preference(row, "row 1").turns == expected.turns


@pytest.mark.parametrize(("beside", "expected"), [
    ({"input": "1 2"}, pair("Why?\n1 2")),
    ({"context": "A fact."}, pair("A fact.\n\nWhy?")),
    ({"history": "They spoke."}, pair("They spoke.\n\nWhy?")),
    ({"history": [["Hi", "Hello"]]}, pair("Hi", "Hello", "Why?")),
    ({"history": [user("Hi"), bot("Hello")]}, pair("Hi", "Hello", "Why?")),
    ({"context": "A fact.", "input": "1 2"}, pair("A fact.\n\nWhy?\n1 2")),
    ({"system_prompt": "Be kind."}, pair("Why?", system="Be kind.")),
    ({"system": "Be kind.", "system_prompt": "Be  kind."}, pair("Why?", system="Be kind.")),
    ({"input": "why?"}, pair("Why?\nwhy?")),
    ({"input": "Why?"}, pair("Why?")),
    ({"input": None, "history": [], "context": "  "}, pair("Why?")),
    ({"instruction": "Why?"}, pair("Why?")),
    ({"question": "Why"}, pair("Why?")),
])  # fmt: skip
def test_columns_beside_the_prompt_become_part_of_it(beside, expected):
    assert to_preference({"prompt": "Why?", **BOTH, **beside}, "row 1") == expected
    assert to_preference({"prompt": "Why?", **AS_MESSAGES, **beside}, "row 1") == expected


def test_a_short_input_is_not_taken_for_one_that_the_prompt_has_already():
    for text in ("1", "Add", "Add 1", "and 2"):
        assert to_preference({"instruction": "Add 10 and 2", "input": text, **BOTH}, "row 1") == pair(f"Add 10 and 2\n{text}")
    long = "a text that is too long to be there by chance"
    assert to_preference({"prompt": f"Read {long}, and answer.", "context": long, **BOTH}, "row 1") == pair(f"Read {long}, and answer.")
    assert to_preference({"prompt": "Add.\n\n1 2", "instruction": "Add.", "input": "1 2", **BOTH}, "row 1") == pair("Add.\n\n1 2")


def test_a_context_beside_whole_dialogues_goes_to_their_last_question():
    assert to_preference({**WHOLE, "context": "A fact."}, "row 1") == pair("A fact.\n\nWhy?")
    assert to_preference({"prompt": "Why?", **WHOLE, "context": "A fact.", "system": "Be kind."}, "row 1") == pair(
        "A fact.\n\nWhy?", system="Be kind."
    )
    assert to_preference({"prompt": [{"role": "system", "content": "Be kind."}, user("Why?")], **WHOLE}, "row 1") == pair(
        "Why?", system="Be kind."
    )


PRINTED = {
    "Python": "[{'role': 'user', 'content': \"Why's that?\"}, {'role': 'assistant', 'content': '%s'}]",
    "JSON": '[{"role": "user", "content": "Why\'s that?"}, {"role": "assistant", "content": "%s"}]',
    "numpy": "[{'content': \"Why's that?\", 'role': 'user'}\n {'content': '%s', 'role': 'assistant'}]",
    "null-padded": "[{'from': None, 'role': 'user', 'content': \"Why's that?\"}, {'from': None, 'role': 'assistant', 'content': '%s'}]",
}


@pytest.mark.parametrize("way", PRINTED)
def test_printed_message_lists_are_read_as_messages(way):
    row = {"prompt": "Why's that?", "chosen": PRINTED[way] % "good", "rejected": PRINTED[way] % "bad"}
    assert to_preference(row, "row 1") == pair("Why's that?")


def test_what_looks_like_printed_messages_and_cannot_be_read_is_refused():
    with pytest.raises(InputError, match="field 'chosen' looks like a printed list of messages, and is neither JSON nor a Python list"):
        to_preference({"prompt": "p", "chosen": "[{'role': 'user', 'content': 'cut o", "rejected": "bad"}, "row 1")


def test_an_answer_that_is_json_itself_stays_text():
    for text in ('{"content": 3}', '[{"from": "Oslo", "to": "Rome"}]', "[1, 2]"):
        assert to_preference({"prompt": "p", "chosen": text, "rejected": "bad"}, "row 1").chosen == text


@pytest.mark.parametrize(("scores", "expected"), [
    ({"chosen_rating": 5, "rejected_rating": 5.0}, "tie"),
    ({"chosen_rating": 2, "rejected_rating": 5}, "scores contradict"),
    ({"chosen-rating": "2", "rejected-rating": "5"}, "scores contradict"),
    ({"score_chosen": 3, "score_rejected": 4}, "scores contradict"),
    ({"chosen_score": 3, "rejected_score": 4}, "scores contradict"),
    ({"rating_chosen": 4, "rating_rejected": 4}, "tie"),
    ({"chosen_avg_rating": 1.5, "rejected_avg_rating": 1.75}, "scores contradict"),
    ({"chosen_reward": -1.5, "rejected_reward": -1.25}, "scores contradict"),
    ({"margin": 0.0}, "tie"),
    ({"margin": -2}, "scores contradict"),
    ({"chosen_score": 3, "rejected_score": 1, "margin": -2}, "scores contradict"),
    ({"chosen_score": 9.0, "status": "tie"}, "tie"),
    ({"margin": 2.5}, 2.5),
    ({"chosen_rating": 5, "rejected_rating": 3}, 2),
    ({"chosen_rating": 5, "rejected_rating": None}, None),
    ({"chosen_rating": float("nan"), "rejected_rating": float("nan")}, None),
    ({"chosen_rating": "N/A", "rejected_rating": 3}, None),
    ({"chosen_model": "a", "rejected_model": "b", "chosen_rationale": "nice"}, None),
])  # fmt: skip
def test_scores_beside_a_pair_are_heeded(scores, expected):
    told = to_preference({"prompt": "Why?", **BOTH, **scores}, "row 1")
    assert told == (Dropped("row 1", expected) if isinstance(expected, str) else pair("Why?"))
    assert isinstance(told, Dropped) or told.gap == expected


WRAPPED_PROMPTS = {
    "RWKV": "User: Hi\n\nAssistant: Hello\n\nUser: Why?\n\nAssistant:",
    "RWKV with a system message": "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello\n\nUser: Why?\n\nAssistant:",
    "ChatML": (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "Llama 2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Why? [/INST]",
    "Mistral": "<s>[INST] Hi [/INST] Hello</s>[INST] Why? [/INST]",
    "Llama 3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "Zephyr": "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
    "Zephyr, nothing to the system": "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n<|user|>\nWhy?</s>\n<|assistant|>\n",
    "Gemma": (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n"
        "<start_of_turn>model\n"
    ),
    "hh": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:",
    "Guanaco": "### Human: Hi\n### Assistant: Hello\n### Human: Why?\n### Assistant:",
    "Vicuna": "Be kind. USER: Hi ASSISTANT: Hello</s>USER: Why? ASSISTANT:",
}


@pytest.mark.parametrize("template", WRAPPED_PROMPTS)
def test_a_prompt_with_a_chat_template_is_turned_into_turns_and_counted(template):
    text, notes = WRAPPED_PROMPTS[template], Notes()
    system = "Be kind." if "Be kind." in text else ""
    told = to_preference({"prompt": text, **BOTH}, "row 1", notes=notes)
    if template == "hh":
        told = Preference(told.where, told.system, tuple(map(str.strip, told.turns)), told.chosen.strip(), told.rejected.strip())
    else:
        assert notes.counts == {WRAPPED: 1}
        # To the letter, when that is asked for.
        assert to_preference({"prompt": text, **BOTH}, "row 1", "plain") == pair(text)
    assert told == pair("Hi", "Hello", "Why?", system=system)


def test_single_turns_in_the_originals_and_in_alpacas_templates_are_unwrapped():
    for text in ("User: Why?\n\nAssistant:", "Question: Why?\n\nAnswer:", "Input: Why?\n\nResponse:", "[INST] Why? [/INST]",
                 "### Instruction:\nWhy?\n\n### Response:\n",
                 "Below is an instruction that describes a task. Write.\n\n### Instruction:\nWhy?\n\n### Response:"):  # fmt: skip
        assert to_preference({"prompt": text, **BOTH}, "row 1") == pair("Why?")
    text = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert to_preference({"prompt": text, **BOTH}, "row 1") == pair("Add.\n1 2")


def test_marks_that_end_answers_go_with_those_of_the_prompt():
    row = {"prompt": WRAPPED_PROMPTS["ChatML"], "chosen": "good<|im_end|>\n", "rejected": "bad<|im_end|>"}
    assert to_preference(row, "row 1") == pair("Hi", "Hello", "Why?")
    whole = {name: f"<s>[INST] Why? [/INST] {said} </s>" for name, said in BOTH.items()}
    assert to_preference(whole, "row 1") == pair("Why?")


@pytest.mark.parametrize("text", [
    "What does <|im_start|> mean?", "How do I write [INST]?", "Who was the first User: me?", "User: and Assistant: are words.",
    "Question: Why?\n\nAnswer: so\n\nQuestion: And?\n\nAnswer:", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>user\nHo", "",
])  # fmt: skip
def test_prompts_that_only_speak_of_templates_stay_as_they_are(text):
    notes = Notes()
    assert to_preference({"prompt": text, **BOTH}, "row 1", notes=notes).turns == (text,)
    assert not notes.counts


@pytest.mark.parametrize(("asker", "answerer", "system"), [
    ("human", "gpt", "system"), ("Human", "GPT", "System"), ("USER", "Assistant", "developer"), ("user", "model", "Developer"),
    ("prompter", "bot", "system"), ("user", "chatgpt", "system"), ("human", "GPT4", "system"),
])  # fmt: skip
def test_roles_have_many_names_in_any_case(asker, answerer, system):
    lead = [{"from": system, "value": "Be kind."}, {"from": asker, "value": "Why?"}]
    row = {name: [*lead, {"from": answerer, "value": said}] for name, said in BOTH.items()}
    assert to_preference(row, "row 1") == pair("Why?", system="Be kind.")


@pytest.mark.parametrize("turn", [
    {"role": "tool", "content": "42", "tool_call_id": "1"}, {"role": "function", "name": "f", "content": "42"},
    {"from": "observation", "value": "42"}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    {"from": "function_call", "value": "f()"}, {"role": "assistant", "content": "Let me see.", "function_call": {"name": "f"}},
])  # fmt: skip
def test_dialogues_with_tools_are_dropped_by_name(turn):
    row = {name: [user("Why?"), turn, bot(said)] for name, said in BOTH.items()}
    assert to_preference(row, "row 1") == Dropped("row 1", "tool turns")


def test_texts_of_parts_are_joined_and_images_counted():
    notes = Notes()
    image = {"type": "image_url", "image_url": {"url": "x"}}
    parts = [{"type": "text", "text": "Why", "image_url": None}, image, {"type": "text", "text": "so?"}]
    row = {name: [user(parts), bot([{"type": "text", "text": said}])] for name, said in BOTH.items()}
    assert to_preference(row, "row 1", notes=notes) == pair("Why\nso?")
    assert notes.counts == {IMAGES: 2}
    assert to_preference({"prompt": "Why?", "images": ["x"], **BOTH}, "row 1", notes=notes) == pair("Why?")
    assert notes.counts == {IMAGES: 3}


def test_answers_without_a_score_are_left_out_and_counted():
    notes = Notes()
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, None, "N/A"]}
    assert to_preference(row, "row 1", notes=notes) == ranking(["a"], [1], "p")
    assert notes.counts == {UNSCORED: 2}
    assert to_preference(row | {"scores": [None] * 3}, "row 1") == Dropped("row 1", "no scores")


@pytest.mark.parametrize(("name", "change", "reason"), [
    ("SHP", {"labels": 0}, "scores contradict"),
    ("UltraFeedback", {"completions": []}, "no answers"),
    ("chatbot_arena_conversations", {"conversation_b": [user("Who?"), bot("x")]}, "answers of several turns"),
])  # fmt: skip
def test_rated_rows_without_a_preference_are_dropped(name, change, reason):
    assert to_preference(PUBLISHED[name][0] | change, "row 1") == Dropped("row 1", reason)


ASK = {"ask": "Why?", "good": "good", "poor": "bad"}


def test_columns_of_any_names_can_be_named():
    named = parse_columns("prompt=ask, chosen=good,rejected=poor")
    assert to_preference(ASK, "row 1", columns=named) == pair("Why?")
    row = {"prompt": "other", "instruction": "other", "input": "1 2", "system": "s", **ASK}
    assert to_preference(row, "row 1", columns=named) == pair("Why?\n1 2", system="s")
    nested = {"post": {"body": "Why?"}, **BOTH}
    assert to_preference(nested, "row 1", columns={"prompt": "post.body"}) == pair("Why?")
    rated = {"q": "Why?", "all": ["a", "b"], "stars": [1, 2]}
    assert to_preference(rated, "row 1", columns=parse_columns("prompt=q,answers=all,scores=stars")) == ranking(["a", "b"], [1, 2], "Why?")
    scored = {**BOTH, "prompt": "Why?", "s1": 1, "s2": 2}
    named = parse_columns("chosen_score=s1,rejected_score=s2")
    assert to_preference(scored, "row 1", columns=named) == Dropped("row 1", "scores contradict")
    swapped = {"prompt": "Why?", "chosen": "bad", "rejected": "good"}
    assert to_preference(swapped, "row 1", columns=parse_columns("chosen=rejected,rejected=chosen")) == pair("Why?")


@pytest.mark.parametrize(("text", "fault"), [
    ("prompt", "'prompt' is not ROLE=COLUMN"), ("ask=prompt", "'ask=prompt' is not ROLE=COLUMN, with a ROLE of prompt, system"),
    ("prompt=", "'prompt=' is not ROLE=COLUMN"), ("prompt=a,prompt=b", "names prompt twice"),
])  # fmt: skip
def test_bad_columns_are_refused(text, fault):
    with pytest.raises(InputError, match=re.escape(fault)):
        parse_columns(text)


@pytest.mark.parametrize(("row", "fault"), [
    (ASK, "has the columns 'ask', 'good', 'poor'; a row has"),
    ({"ask": "Why?", **BOTH}, "has the columns 'ask', 'chosen', 'rejected', and none is known as the prompt; --columns prompt=ask names"),
    ({"prompt": "Why?", "question": "Who?", **BOTH}, "fields 'prompt' and 'question' are two prompts; --columns prompt=prompt or prompt"),
    ({"prompt": "Why?", "responses": ["a"], "scores": [1, 2]}, "field 'scores' has 2 values for the 1 answers in 'responses'"),
    ({"prompt": "Why?", "responses": ["a", "b"], "scores": [1, "good"]}, "field 'scores' is 'good'; expected a number"),
    ({"prompt": "Why?", "responses": ["a", "b"], "scores": [1, float("inf")]}, "field 'scores' is inf; expected a number"),
    ({"responses": ["a", "b"], "scores": [1, 2]}, "has the columns 'responses', 'scores'; a row has a prompt and a list of answers"),
    ({"prompt": "Why?", "responses": ["a", "b"]}, "has the columns 'prompt', 'responses'; a row has"),
    ({"prompt": "Why?", "completion": "a", "label": "so so"}, "field 'label' is 'so so'; expected true or false"),
    (PUBLISHED["PKU-SafeRLHF"][0] | {"better_response_id": 2}, "field 'better_response_id' is 2; expected 0 or 1"),
    (PUBLISHED["summarize_from_feedback"][0] | {"choice": 2}, "field 'choice' is 2; expected the number of one of the summaries"),
    (PUBLISHED["SHP"][0] | {"labels": "A"}, "field 'labels' is 'A'; expected a number"),
    ({"messages": [user("Hi"), bot("a"), user("Ho")], "rejected_response": "b"}, "field 'chosen' ends with a message from the user"),
])  # fmt: skip
def test_an_unsure_row_is_refused_with_what_was_found(row, fault):
    with pytest.raises(InputError, match=re.escape(fault)):
        to_preference(row, "row 1")


@pytest.mark.parametrize(("first", "then"), [
    (BOTH | {"prompt": "Why?"}, {"chosen": "The sky is blue.", "rejected": "The sky is red."}),
    (BOTH | {"prompt": "Why?"}, PUBLISHED["Nectar"][0]),
    (PUBLISHED["HelpSteer"][0], PUBLISHED["Nectar"][0]),
])  # fmt: skip
def test_rows_of_two_kinds_in_a_file_are_refused(first, then):
    for rows in ((first, then), (then, first)):
        notes = Notes()
        to_preference(rows[0], "row 1", notes=notes)
        with pytest.raises(InputError, match=r"is told by its columns as .*, and the rows before it as "):
            to_preference(rows[1], "row 2", notes=notes)
