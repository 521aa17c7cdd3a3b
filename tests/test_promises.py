"""The table of promises is not behind the source: every break can still be made, and the tests that it names are there."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("tomllib")  # Python 3.11
sys.path.insert(0, str(ROOT / "benchmarks"))
from break_promises import broken, read_table  # noqa: E402 (the path above makes it importable)

TABLE = read_table()


def functions_of(path: Path) -> set[str]:
    """Functions, and methods as Class::method."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names |= {f"{node.name}::{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("name", TABLE)
def test_a_promise_can_be_broken_and_has_its_tests(name):
    promise = TABLE[name]
    assert promise.keys() - {"needs"} == {"promise", "file", "text", "broken", "tests"}
    text = broken(promise, ROOT)
    assert text != (ROOT / promise["file"]).read_text()
    if promise["file"].endswith(".py"):
        ast.parse(text)
    assert promise["tests"]
    for test in promise["tests"]:
        path, _, function = test.partition("::")
        assert not function or function in functions_of(ROOT / path), test
