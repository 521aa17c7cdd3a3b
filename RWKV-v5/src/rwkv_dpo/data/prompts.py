"""How a preference is written as text: what stands before, between and after the turns."""

import hashlib
import re
from typing import NamedTuple

from rwkv_dpo.data.sources import Preference

MODES = ("mix", "chat")
# The original's single-turn prompts and how often each is drawn.
TEMPLATES = (
    ("User: {prompt}\n\nAssistant:", 0.8),
    ("Question: {prompt}\n\nAnswer:", 0.1),
    ("Input: {prompt}\n\nResponse:", 0.1),
)


class Rendered(NamedTuple):
    """The texts of one pair; prompt + chosen and prompt + rejected read on without a seam."""

    prompt: str
    chosen: str
    rejected: str


def clean(text: str) -> str:
    """Strip, and make one newline of every run of them: an empty line is what ends a turn."""
    return re.sub(r"[\r\n]+", "\n", text.strip())


def render(preference: Preference, mode: str, seed: int) -> Rendered:
    """Write a preference out.

    mode "mix": a single turn without a system message in a template drawn from TEMPLATES, anything else as chat; "chat":
    everything as chat. An answer is empty when its text is.

    >>> render(Preference("row 1", "", ("Hi",), "Hello!", "Go away."), "chat", seed=0)
    Rendered(prompt='User: Hi\\n\\nAssistant:', chosen=' Hello!\\n\\n', rejected=' Go away.\\n\\n')
    """
    system = clean(preference.system)
    turns = [clean(turn) for turn in preference.turns]
    if mode == "mix" and not system and len(turns) == 1:
        prompt = _draw_template(turns[0], seed).format(prompt=turns[0])
    else:
        lines = [f"System: {system}"] if system else []
        lines += [f"{('User', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns)]
        prompt = "\n\n".join([*lines, "Assistant:"])
    return Rendered(prompt, _answer(preference.chosen), _answer(preference.rejected))


def seeded_fraction(purpose: str, seed: int, text: str) -> float:
    """A number in [0, 1) that depends on the text and the seed alone, so that no row's draw depends on other rows."""
    digest = hashlib.blake2b(f"{purpose}/{seed}/{text}".encode(), digest_size=8).digest()
    # 53 bits are what a double holds; more could round up to 1.
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def _draw_template(prompt: str, seed: int) -> str:
    fraction = seeded_fraction("template", seed, prompt)
    for template, weight in TEMPLATES:
        if fraction < weight:
            return template
        fraction -= weight
    return TEMPLATES[-1][0]


def _answer(text: str) -> str:
    cleaned = clean(text)
    return f" {cleaned}\n\n" if cleaned else ""
