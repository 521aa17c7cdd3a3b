"""README.md and docs/: links lead somewhere, commands are commands, tables and messages are those of the code."""

import argparse
import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import foreign_tables
import pytest
from rwkv_dpo.base.parser import OneLineParser
from rwkv_dpo.commands.door import COMMANDS
from rwkv_dpo.run.flags import parse_flags

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md"]
# Made by runs of minutes, and not here yet.
SCRIPTS = {path.name for path in (ROOT / "RWKV-v5").glob("*.py")}
README_LINES = 150


def name_of(path):
    return str(path.relative_to(ROOT))


def without_code(text):
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def anchors(page):
    """Of the headings, as a hub and MkDocs make them; those on which they disagree are none."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    slugs = [re.sub(r"[^\w\- ]", "", head.strip().lower()) for head in re.findall(r"^#+ (.+)$", text, re.M)]
    return [slug.replace(" ", "-") for slug in slugs if not re.search(r"[ -]{2}", slug)]


def blocks(page):
    """The lines of fenced commands, those that a backslash continues being one."""
    text = "\n".join(re.findall(r"^```sh\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S))
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]


def spans(page):
    """Commands within sentences."""
    return re.findall(r"`((?:\./RWKV-v5/\w+\.py|rwkv-dpo \w+) [^`]+)`", page.read_text("utf-8"))


def commands():
    """(page, script, its arguments)."""
    for page in PAGES:
        for line in (*blocks(page), *spans(page)):
            words = shlex.split(line, comments=True)
            for i, word in enumerate(words):
                script, arguments = Path(word).name, words[i + 1 :]
                if script == "rwkv-dpo" and arguments and not arguments[0].startswith("-"):
                    script, arguments = f"{COMMANDS[arguments[0]].module}.py", arguments[1:]
                if script in SCRIPTS:
                    yield pytest.param(script, arguments, id=f"{name_of(page)}: {' '.join(words[i:])[:60]}")


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text("utf-8"))):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.is_relative_to(ROOT), target
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_two_headings_of_a_page_share_an_anchor(page):
    assert len(set(anchors(page))) == len(anchors(page))


def test_every_page_is_linked_from_the_front_page_the_index_and_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in PAGES[1:]:
        assert page.name == "index.md" or f"](docs/{page.name})" in PAGES[0].read_text("utf-8")
        assert page.name == "index.md" or f"]({page.name})" in (ROOT / "docs" / "index.md").read_text("utf-8")
        assert f" {page.name}\n" in navigation


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


class Parsed(Exception):
    """The parser has taken all of the command; what follows looks for files."""


@pytest.mark.parametrize(("script", "arguments"), list(commands()))
def test_every_command_is_one(monkeypatch, script, arguments):
    parse = OneLineParser.parse_args

    def parse_and_leave(self, *args, **kwargs) -> argparse.Namespace:
        parse(self, *args, **kwargs)
        raise Parsed

    goes_on, arguments = "..." in arguments, [word for word in arguments if word != "..."]
    if script == "train.py" and not goes_on:
        parse_flags(arguments)  # with the rules between flags
        return
    monkeypatch.setattr(OneLineParser, "parse_args", parse_and_leave)
    with pytest.raises(Parsed):
        importlib.import_module(f"rwkv_dpo.commands.{script.removesuffix('.py')}").parse_flags(arguments)


def test_commands_are_found():
    found = [param.values[0] for param in commands()]
    assert set(found) == SCRIPTS
    assert sum(len(blocks(page)) for page in PAGES) > len(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    text = page.read_text("utf-8")
    for name in re.findall(r"\b((?:tests|benchmarks|RWKV-v5)/[\w/.-]+\.(?:py|json|jsonl|txt|c|md))\b", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["same", "others", "values"])
def test_names_of_other_programs_are_those_of_the_table(name):
    table = getattr(foreign_tables, name)()
    assert table + "\n" in (ROOT / "docs" / "coming-from.md").read_text("utf-8"), f"python tests/foreign_tables.py {name} prints it"


def equals():
    """Rows of two cells, each nothing but flags: theirs and ours."""
    text = (ROOT / "docs" / "coming-from.md").read_text("utf-8").partition("## All names")[0]
    return re.findall(r"^\| `(--[^`]+)` \| `(--[^`]+)` \|$", text, re.M)


@pytest.mark.parametrize(("theirs", "ours"), equals())
def test_what_others_type_is_what_stands_beside_it(theirs, ours):
    base = ["--load_model", "m.pth", "--data_file", "x", "--dpo_valid_file", "v.save"]
    assert parse_flags(base + theirs.split())[0] == parse_flags(base + ours.split())[0]


@cache
def literals():
    """All texts of the package and the scripts; of one with values in it, the pieces between."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "RWKV-v5").rglob("*.py")]
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return "\n".join(node.value for node in nodes if isinstance(node.value, str))


def messages():
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    cells = re.findall(r"^\| ((?:[^|`]|`[^`]*`)*) \|", text, re.M)
    return [span for cell in cells for span in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.parametrize("message", messages())
def test_a_message_that_is_explained_is_one_of_ours(message):
    assert message in literals()


def test_figures_of_the_front_page_are_those_of_the_pages():
    text = (ROOT / "README.md").read_text("utf-8")
    figures = set(re.findall(r"\b\d+(?:\.\d+)(?:x| GB)", text)) | {"28 kills"}
    pages = "\n".join(page.read_text("utf-8") for page in PAGES[1:])
    for figure in figures:
        assert figure in pages or f"| {figure.removesuffix(' GB')} |" in pages, figure
    assert len(figures) > 4
