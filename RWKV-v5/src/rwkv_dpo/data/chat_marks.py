"""Texts to which a chat template has already been applied, turned back into messages: written out as they are, they would be wrapped
twice."""

import re
from typing import NamedTuple

from rwkv_dpo.data.messages import ROLES
from rwkv_dpo.data.preference import Messages

WRAPPED = "prompts with a chat template were turned into turns"


class _Marks(NamedTuple):
    """`turn`: the mark before a turn, with its speaker as group 1. `end`: marks around turns that are not text. `first`: the speaker of
    what comes before the first turn; empty if nothing may."""

    turn: re.Pattern[str]
    end: re.Pattern[str]
    first: str = ""


_BOS = r"<s>|</s>|<bos>|<eos>|<\|endoftext\|>"
_MARKS = (
    # ChatML
    _Marks(re.compile(r"<\|im_start\|>[ ]*(\w+)[ ]*\n?"), re.compile(rf"<\|im_end\|>|{_BOS}")),
    # Llama 3
    _Marks(
        re.compile(r"<\|start_header_id\|>[ ]*(\w+)[ ]*<\|end_header_id\|>\n*"),
        re.compile(r"<\|eot_id\|>|<\|begin_of_text\|>|<\|end_of_text\|>"),
    ),
    # Zephyr, Phi-3
    _Marks(re.compile(r"<\|(system|user|assistant)\|>\n?"), re.compile(rf"<\|end\|>|{_BOS}")),
    # Gemma
    _Marks(re.compile(r"<start_of_turn>(\w+)\n?"), re.compile(rf"<end_of_turn>|{_BOS}")),
    # NeMo, as in HelpSteer2, whose first turn has no mark
    _Marks(re.compile(r"\n?<extra_id_[01]>(System|User|Assistant)\n?"), re.compile(r"<extra_id_2>[^\n]*\n?"), first="user"),
)
_LAST_END = re.compile("(?:" + "|".join(marks.end.pattern for marks in _MARKS) + r")\Z")
_NOTHING = re.compile(r"(?!)")
# Names before turns are words that people use, too: a text counts only when it begins with one and leaves the last word to the
# Names before turns are also ordinary words: a text counts only if it begins with one and leaves the last turn to the assistant.
_NAMES = (
    _Marks(re.compile(r"(?:\A\s*|\n\n)(System|User|Assistant|Bot):"), _NOTHING),
    _Marks(re.compile(r"(?:\A\s*|\n\n)(System|Human|Assistant):"), _NOTHING),
    _Marks(re.compile(r"(?:\A\s*|\n)###\s*(System|User|Human|Assistant):"), _NOTHING),
    _Marks(re.compile(r"(?:\A|\s|</s>)(USER|ASSISTANT):"), re.compile("</s>"), first="system"),
)
_LLAMA_2 = re.compile(
    r"\s*(?:<s>)?\s*\[INST\]\s*(?:<<SYS>>\s*(?P<system>.*?)\s*<</SYS>>\s*)?(?P<user>.*?)\s*\[/INST\]"
    r"(?P<assistant>.*?)(?:</s>|\Z|(?=(?:<s>)?\s*\[INST\]))",
    re.DOTALL,
)
_ONE_TURN = (
    re.compile(r"\A\s*(?P<first>)Question: (?P<user>.*)\n\nAnswer:\s*\Z", re.DOTALL),
    re.compile(r"\A\s*(?P<first>)Input: (?P<user>.*)\n\nResponse:\s*\Z", re.DOTALL),
    re.compile(r"\A(?P<first>.*?)### Instruction:\n(?P<user>.*?)\n### Response:\s*\Z", re.DOTALL),
)
_ALPACA_FIRST = re.compile(r"\s*Below is an instruction that describes a task")


def unwrapped_prompt(text: str) -> Messages | None:
    """The messages of a prompt that carries a template, the last of them the user's; None for any other text.

    >>> unwrapped_prompt("<|im_start|>system\\nBe kind.<|im_end|>\\n<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n")
    [('system', 'Be kind.'), ('user', 'Hi')]
    """
    # Without their ends, the patterns would search a text over and over.
    ends = text[-1000:].rstrip().endswith(("\n\nAnswer:", "\n\nResponse:", "\n### Response:"))
    for pattern in _ONE_TURN if ends else ():
        if (found := pattern.match(text)) and not re.search(r"\n\n(?:Question|Input|Answer|Response):|### Response:", found["user"]):
            first = "" if _ALPACA_FIRST.match(found["first"]) else found["first"].strip()
            turn = "\n".join(part.strip("\n") for part in found["user"].split("\n### Input:\n", 1))
            return [("system", first), ("user", turn)] if first else [("user", turn)]
    messages = _told(text, needs_cue=True)
    if not messages:
        return None
    if messages[-1][0] == "assistant" and not messages[-1][1].strip():
        messages.pop()
    return messages if messages and messages[-1][0] == "user" else None


def unwrapped_dialogue(text: str) -> Messages | None:
    """The messages of a dialogue that is written in a template, the last of them the assistant's; None for any other text."""
    messages = _told(text, needs_cue=False)
    return messages if messages and messages[-1][0] == "assistant" and len(messages) > 1 else None


def unwrapped_answer(text: str) -> str:
    """An answer without the mark with which its template ends it."""
    bare = text.rstrip()
    while found := _LAST_END.search(bare):
        text = bare = bare[: found.start()].rstrip()
    return text


def _told(text: str, needs_cue: bool) -> Messages | None:
    if "[/INST]" in text:
        return _llama_2(text)
    for marks in _MARKS:
        if marks.turn.search(text):
            return _split(text, marks)
    for marks in _NAMES:
        parts = marks.turn.split(text)
        is_whole = len(parts) > 3 and (marks.first == "system" or not parts[0].strip())
        has_cue = is_whole and ROLES[parts[-2].lower()] == "assistant" and not parts[-1].strip()
        if is_whole and (has_cue or not needs_cue):
            return _split(text, marks)
    return None


def _split(text: str, marks: _Marks) -> Messages | None:
    lead, *turns = marks.turn.split(text)
    messages = []
    if lead := marks.end.sub("", lead).strip():
        if not marks.first:
            return None
        messages.append((marks.first, lead))
    for speaker, said in zip(turns[::2], turns[1::2], strict=True):
        if speaker.lower() not in ROLES:
            return None
        messages.append((ROLES[speaker.lower()], marks.end.sub("", said).strip()))
    if messages[0] == ("system", ""):
        messages.pop(0)
    return messages if is_alternating(messages) else None


def _llama_2(text: str) -> Messages | None:
    messages: Messages = []
    at = 0
    while at < len(text.rstrip()):
        found = _LLAMA_2.match(text, at)
        if not found or found.end() == at:
            return None
        if found["system"]:
            messages.append(("system", found["system"]))
        messages += [("user", found["user"]), ("assistant", found["assistant"].strip())]
        at = found.end()
    return messages if is_alternating(messages) else None


def is_alternating(messages: Messages) -> bool:
    """Whether, after an optional system message, user and assistant take turns, the user first."""
    turns = messages[1:] if messages and messages[0][0] == "system" else messages
    return bool(turns) and all(role == ("user", "assistant")[i % 2] for i, (role, _) in enumerate(turns))
