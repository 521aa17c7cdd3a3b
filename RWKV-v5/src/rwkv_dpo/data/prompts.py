"""How a preference is written as text: what stands before, between and after the turns."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rwkv_dpo.base.errors import InputError, read_utf8, refuse
from rwkv_dpo.data.preference import Preference


@dataclass(frozen=True)
class Templates:
    """single: how a dialogue of one turn without a system message is written, and how often each way is drawn ({prompt} is the
    turn); without any, and for all other dialogues, each message begins with its speaker's name. answer: how answers are written.
    """

    name: str
    single: Mapping[str, float] = field(default_factory=dict)
    system: str = "System"
    user: str = "User"
    assistant: str = "Assistant"
    answer: str = " {answer}\n\n"

    @property
    def is_g1(self) -> bool:
        """The form of G1 models, whose answers may begin with a span of <think>."""
        return self.name in ("g1", "g1-think")


MODES = {
    # The original's three.
    "mix": Templates(
        "mix", {"User: {prompt}\n\nAssistant:": 0.8, "Question: {prompt}\n\nAnswer:": 0.1, "Input: {prompt}\n\nResponse:": 0.1}
    ),
    "chat": Templates("chat"),
    # As RWKV-7 G1 models were trained.
    "g1": Templates("g1"),
    "g1-think": Templates("g1-think"),
}

# A span of thinking in G1's form, and an empty one. The model itself writes the last ">" of what a prompt ends with.
_THINK, _NO_THOUGHT = "<think>", "<think>\n</think>"


class Rendered(NamedTuple):
    """The texts of one pair; prompt + chosen and prompt + rejected read on without a seam. `cue` is how the prompt ends, after the
    last user turn."""

    prompt: str
    chosen: str
    rejected: str
    cue: str


def load_templates(name: str) -> Templates:
    """The templates of a name in MODES, or of a user's file. InputError, naming the file, when it is no such file.

    .txt: how a single turn is written, with {prompt} in it; a last line end does not count. .json: an object with any of the fields
    of Templates but the name; what it leaves out is as in "chat".

        {"single": {"Q: {prompt}\\nA:": 3, "{prompt}\\n": 1}, "user": "Human", "assistant": "Bot", "answer": " {answer}\\n\\n"}
    """
    if name in MODES:
        return MODES[name]
    path = Path(name)
    if path.suffix not in (".txt", ".json"):
        refuse(f"--templates {name}: accepted are {', '.join(MODES)}, and a .txt or .json file")
    text = read_utf8(f"--templates {name}", path)
    return _checked(path.name, {"single": {text.removesuffix("\n"): 1.0}} if path.suffix == ".txt" else _parsed(text, name), name)


def clean(text: str) -> str:
    """Strip, and make one newline of every run of them: an empty line is what ends a turn."""
    return re.sub(r"[\r\n]+", "\n", text.strip())


def render(preference: Preference, templates: Templates, seed: int) -> Rendered:
    """Write a preference out. An answer is empty when its text is.

    >>> render(Preference("row 1", "", ("Hi",), "Hello!", "Go away."), MODES["chat"], seed=0)
    Rendered(prompt='User: Hi\\n\\nAssistant:', chosen=' Hello!\\n\\n', rejected=' Go away.\\n\\n', cue='\\n\\nAssistant:')
    """
    system = clean(preference.system)
    turns = [clean(turn) for turn in preference.turns]
    if templates.single and not system and len(turns) == 1:
        before, _, cue = _draw(templates.single, turns[0], seed).partition("{prompt}")
        prompt = before + turns[0] + cue
    else:
        names = templates.user, templates.assistant
        lines = [f"{templates.system}: {system}"] if system else []
        lines += [f"{names[i % 2]}: {turn}" for i, turn in enumerate(turns)]
        cue = f"\n\n{templates.assistant}:"
        prompt = "\n\n".join(lines) + cue
    if templates.is_g1:
        return _thinking(prompt, cue, (preference.chosen, preference.rejected), templates)
    return Rendered(prompt, _answer(preference.chosen, templates), _answer(preference.rejected, templates), cue)


def seeded_fraction(purpose: str, seed: int, text: str) -> float:
    """A number in [0, 1) that depends on the text and the seed alone, so that no row's draw depends on other rows."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{text}".encode(), digest_size=8).digest()
    # 53 bits are what a double holds; more could round up to 1.
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _draw(single: Mapping[str, float], prompt: str, seed: int) -> str:
    point = seeded_fraction("template", seed, prompt) * sum(single.values())
    for template, weight in single.items():
        if point < weight:
            return template
        point -= weight
    # Only rounding leads here.
    return template


def _answer(text: str, templates: Templates) -> str:
    cleaned = clean(text)
    return templates.answer.replace("{answer}", cleaned) if cleaned else ""


def _thinking(prompt: str, cue: str, answers: tuple[str, str], templates: Templates) -> Rendered:
    """Answers, which keep their blank lines, with spans of thinking: those that they have, and empty ones where all are to have one. What
    both begin with ends the prompt."""
    texts = [re.sub(r"\r\n?", "\n", text).strip() for text in answers]
    found = [text.startswith(_THINK) for text in texts if text]
    if templates.name == "g1-think" or (found and all(found)):
        opening = _THINK[:-1] if any(found) else _NO_THOUGHT[:-1]
        whole = [text if text.startswith(_THINK) else f"{_NO_THOUGHT}\n{text}" for text in texts]
        chosen, rejected = (f"{begun.removeprefix(opening)}\n\n" if text else "" for begun, text in zip(whole, texts, strict=True))
        return Rendered(f"{prompt} {opening}", chosen, rejected, f"{cue} {opening}")
    chosen, rejected = (templates.answer.replace("{answer}", text) if text else "" for text in texts)
    return Rendered(prompt, chosen, rejected, cue)


def _parsed(text: str, name: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--templates {name}: not JSON: {error}") from error
    return settings if isinstance(settings, dict) else refuse(f"--templates {name}: expected an object, found {type(settings).__name__}")


def _checked(file_name: str, settings: dict[str, Any], name: str) -> Templates:
    accepted = ("single", "system", "user", "assistant", "answer")
    if unknown := settings.keys() - set(accepted):
        refuse(f"--templates {name}: unknown field {min(unknown)!r}; accepted are {', '.join(accepted)}")
    single = settings.get("single", {})
    if not isinstance(single, dict) or not all(isinstance(weight, int | float) and 0 < weight < 1e9 for weight in single.values()):
        refuse(f"--templates {name}: field 'single' is an object of templates and their weights, which are above 0")
    for template in single:
        if template.count("{prompt}") != 1:
            refuse(f"--templates {name}: {template!r} has {{prompt}} {template.count('{prompt}')} times; expected once")
    for key in accepted[1:]:
        if key in settings and not (isinstance(settings[key], str) and settings[key].strip()):
            refuse(f"--templates {name}: field '{key}' is {settings[key]!r}; expected text")
    if settings.get("answer", "{answer}").count("{answer}") != 1:
        refuse(f"--templates {name}: field 'answer' is {settings['answer']!r}; expected {{answer}} in it, once")
    return Templates(file_name, **settings)
