"""The floors of the house: a module imports only from lower floors, or its own folder."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "RWKV-v5" / "src" / "rwkv_dpo"

# As in CONTRIBUTING.md. Folders count as one place.
FLOORS = [
    {
        "errors", "signals", "locks", "atomic", "file_kinds", "pickles", "torch_archives", "schedule", "sampling", "config", "losses",
        "foreign_flags", "run_length", "packages", "json_text",
    },
    {"flags", "wkv", "linear_logprobs", "data", "forest", "chunks", "device"},
    {"model", "chunked_step", "objective"},
    {"training", "evaluation"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# Within a floor these look at one another in one direction.
WITHIN = {
    ("errors", "packages"), ("errors", "signals"), ("config", "schedule"), ("config", "errors"), ("sampling", "errors"),
    ("atomic", "errors"), ("atomic", "locks"), ("torch_archives", "pickles"), ("file_kinds", "errors"), ("foreign_flags", "errors"),
    ("run_length", "config"), ("run_length", "errors"), ("run_length", "schedule"),
    ("forest", "data"), ("chunks", "forest"), ("chunked_step", "model"), ("objective", "model"), ("objective", "chunked_step"),
    ("training", "evaluation"),
}  # fmt: skip
STANDARD_ONLY = FLOORS[0] - {"losses"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    here = place(path)
    if here == "__init__":
        assert imports(path) == []
        return
    for name in imports(path):
        if name.startswith("rwkv_dpo."):
            there = name.split(".")[1]
            assert there == here or FLOOR[there] < FLOOR[here] or (here, there) in WITHIN, f"{here} imports {there}"
        elif name.startswith(("pytorch_lightning", "deepspeed", "wandb")):
            assert FLOOR[here] == 3, f"{here} imports {name}"
        elif here in STANDARD_ONLY:
            assert name.split(".")[0] in sys.stdlib_module_names, f"{here} imports {name}"


def test_every_module_has_a_floor_and_every_name_exists():
    assert {place(path) for path in MODULES} - {"__init__"} == set(FLOOR)


def test_modules_stay_readable():
    assert all(len(path.read_text().splitlines()) <= 300 for path in MODULES)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_what_windows_lacks_is_imported_in_a_try(path):
    """So that every module can be imported there."""
    posix_only = {"fcntl", "grp", "posix", "pwd", "resource", "termios"}
    tree = ast.parse(path.read_text())
    tries = [node for node in ast.walk(tree) if isinstance(node, ast.Try) and "ImportError" in map(ast.unparse, _caught(node))]
    guarded = {node for one in tries for statement in one.body for node in ast.walk(statement)}
    unguarded = [node for node in ast.walk(tree) if isinstance(node, ast.Import) and node not in guarded]
    assert not posix_only & {alias.name for node in unguarded for alias in node.names}


def _caught(node: ast.Try) -> list[ast.expr]:
    return [handler.type for handler in node.handlers if handler.type is not None]
