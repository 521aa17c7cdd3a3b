"""The house: rooms one above the other, each with what its first lines say, settings only where they are read."""

import ast
import dataclasses
import importlib
from pathlib import Path

import pytest
from rooms import MODULES, OUTSIDE, PACKAGE, ROOMS, allowed, drawing, imported, outside, room_of
from rwkv_dpo.run.settings import ROOMS as SETTINGS

NAMES = [str(path.relative_to(PACKAGE)) for path in MODULES]
LONGEST, SHORTEST = 250, 30
# Shorter ones, and why they stand alone.
SHORT = {"data/settings.py": "a room's settings", "run_folder/settings.py": "a room's settings",
         "report/page.py": "what it fills is page.html", "kernels/wkv6/reference.py": "the walk over tokens is loop.py",
         "kernels/wkv7/reference.py": "the walk over tokens is loop.py"}  # fmt: skip


def test_every_module_is_in_a_room_and_every_room_says_what_it_is():
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ROOMS)
    assert {path.name for path in PACKAGE.glob("*.py")} == OUTSIDE
    for room in ROOMS:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
        assert "May import: " in text, room
        assert "Must not enter: " in text, room


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_may_import_rooms_below_it_alone(room):
    assert allowed(room) & set(ROOMS) <= set(ROOMS[: ROOMS.index(room)])


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_a_module_imports_what_its_room_may(path):
    assert outside(path) <= allowed(room_of(path))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_nothing_that_it_does_not_do(room):
    assert allowed(room) == set().union(*(outside(path) for path in MODULES if room_of(path) == room))


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_settings_are_read_in_their_own_room_alone(path):
    """run/ composes them and hands values on; the help of a command may name a default."""
    taken = {name.split(".")[1] for name in imported(path) if name.startswith("rwkv_dpo.") and name.split(".")[2:3] == ["settings"]}
    assert room_of(path) in ("run", "commands") or taken <= {room_of(path)}


def test_every_flag_is_read_in_its_room_or_handed_on_by_the_assembler():
    read: dict[str, set[str]] = {}
    for path in MODULES:
        if path.name != "settings.py":
            names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            read.setdefault(room_of(path), set()).update(names)
    for settings in SETTINGS.values():
        room = settings.__module__.split(".")[1]
        derived = (Path(importlib.import_module(settings.__module__).__file__ or "")).read_text()
        for field in dataclasses.fields(settings):
            is_read = field.name in read[room] | read["run"] or f"self.{field.name}" in derived
            assert is_read or field.name == "my_testing", f"--{field.name} of {settings.__module__}"


def test_the_drawing_is_current():
    assert drawing() in (PACKAGE.parents[2] / "CONTRIBUTING.md").read_text(), "python tests/rooms.py draws it"


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
def test_modules_stay_readable(path):
    n, name = len(path.read_text().splitlines()), str(path.relative_to(PACKAGE))
    assert n <= LONGEST
    assert n >= SHORTEST or path.name == "__init__.py" or name in SHORT


@pytest.mark.parametrize("path", MODULES, ids=NAMES)
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
