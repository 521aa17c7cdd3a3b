"""What is written as JSON is JSON."""

import ast
import json
from pathlib import Path

import pytest
from rwkv_dpo.files.json_text import as_json

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*(ROOT / "RWKV-v5").glob("*.py"), *(ROOT / "RWKV-v5" / "src").rglob("*.py")]


def test_numbers_that_json_does_not_know_become_null():
    value = {"a": float("nan"), "b": [1.5, (float("inf"), -float("inf"))], "c": {"d": True, "e": "NaN"}, "f": 2**70}
    assert json.loads(as_json(value)) == {"a": None, "b": [1.5, [None, None]], "c": {"d": True, "e": "NaN"}, "f": 2**70}
    assert as_json(value["b"], indent=1) == "[\n 1.5,\n [\n  null,\n  null\n ]\n]"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_else_writes_json(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute) and node.attr in ("dump", "dumps")]
    written = [call for call in calls if isinstance(call.value, ast.Name) and call.value.id == "json"]
    assert len(written) == (path.name == "json_text.py")
