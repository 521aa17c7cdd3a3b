"""The words of pages, help texts, messages, docstrings and comments: none that a reader of the field stumbles over."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = sorted((ROOT / "RWKV-v5").rglob("*.py"))

# What is not written here, as a regular expression whose spaces may be any white space, and what is written instead.
INSTEAD = {
    "by the clock": "in wall-clock time",
    "passed over": "falls back to",
    "anew": "again, from scratch",
    "go(es)? on (to|with|from|where)": "continue",
    "goes on": "continues",
    "torn": "incomplete, truncated",
    "made-up pairs": "synthetic pairs",
    "ranked right": "ranked correctly",
    "(so|as) many optimizer steps": "N optimizer steps",
    "every so many": "every N",
    "after so many": "after N",
    "(a|one) (line|row|file) an? (epoch|step|evaluation|pair)": "one line per epoch",
    r"(tokens|seconds|ms|nats|bytes|numbers|values|steps|times) an? (second|step|token|pair|call|layer|parameter|weight|row)": "per",
    r"\d numbers": "parameters, or values",
    "differ by .{1,12} of their size": "the relative difference",
    "by itself is": "alone is",
    "begin alike": "have a common beginning",
    "come(s)? of": "come from, follow from",
    "all the same": "anyway",
    "belongs into": "belongs in",
    "the like": "such, similar",
    "likeliest": "most likely",
    "mend(ed|s)?": "fix",
    "but for rounding": "up to rounding",
    "put right": "corrected",
    "knows nothing of": "does not depend on",
}


def proofread(text):
    """(line, what stands there, what should)."""
    for phrase, instead in INSTEAD.items():
        for found in re.finditer(rf"\b(?:{phrase})\b".replace(" ", r"\s+"), text, re.IGNORECASE):
            yield text.count("\n", 0, found.start()) + 1, " ".join(found[0].split()), instead


def without_code(page):
    """A page's prose, on the lines where it stands."""
    return re.sub(r"^```.*?^```$|`[^`\n]*`", lambda code: "\n" * code[0].count("\n"), page, flags=re.M | re.S)


def words_of(source):
    """A module's texts, docstrings and comments, on the lines where they begin. A comment may continue on the next line."""
    lines = [""] * (source.count("\n") + 2)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            lines[node.lineno] += " " + " ".join(node.value.split())
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] += " " + token.string.lstrip("# ")
    return "\n".join(lines[1:])


@pytest.mark.parametrize("path", [*PAGES, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_are_plain(path):
    text = path.read_text("utf-8")
    found = list(proofread(words_of(text) if path.suffix == ".py" else without_code(text)))
    assert not found, "\n".join(f"{path.relative_to(ROOT)}:{line}: {words!r}: {instead}" for line, words, instead in found)


def test_a_phrase_is_found_wherever_it_is_written():
    source = '"""A run\n    goes on."""\nx = f"{1} torn {2}"  # is done\n# anew\n'
    assert [(line, words) for line, words, _ in proofread(words_of(source))] == [(4, "anew"), (1, "goes on"), (3, "torn")]
    page = "Torn.\n\n```text\ntorn\n```\n\n`torn`, and it\ngoes on\n"
    assert [(line, words) for line, words, _ in proofread(without_code(page))] == [(8, "goes on"), (1, "Torn")]
