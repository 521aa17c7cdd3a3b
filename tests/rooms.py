"""The rooms of the package, what each says that it may import, and what it does import.

    python tests/rooms.py        the drawing that CONTRIBUTING.md shows
"""

import ast
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "RWKV-v5" / "src" / "rwkv_dpo"
# From the lowest to the highest: a room imports only from rooms before it.
ROOMS = (
    "base", "files", "settings", "data", "report", "batches", "kernels", "devices", "machine", "model", "tuning", "objective", "evaluation",
    "blind", "optimizer", "run_folder", "training", "memory", "run", "commands",
)  # fmt: skip
# Of no room.
OUTSIDE = {"__init__.py", "__main__.py"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def allowed(room: str) -> set[str]:
    """What the first lines of a room's __init__.py say that it may import: rooms and packages."""
    text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())) or ""
    found = re.search(r"^May import: (.*?)\.$", text, re.DOTALL | re.MULTILINE)
    return set(re.split(r",\s+", found[1])) - {"nothing"} if found else set()


def imported(path: Path) -> list[str]:
    """Everything that a module imports, anywhere in it, by its whole name."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def outside(path: Path) -> set[str]:
    """The other rooms and the packages among them; the standard library, and what the house itself is called, aside."""
    tops = {name.split(".")[1] if name.startswith("rwkv_dpo.") else name.split(".")[0] for name in imported(path)}
    return tops - sys.stdlib_module_names - {room_of(path), "__version__"}


def drawing() -> str:
    """A row for each room, with a mark for every room that it imports from: all of them to its left."""
    uses = {room: set().union(*(outside(path) for path in MODULES if room_of(path) == room)) for room in ROOMS}
    width = max(map(len, ROOMS))
    lines = []
    for i, room in enumerate(ROOMS):
        marks = "".join("●  " if other in uses[room] else "·  " for other in ROOMS[:i])
        lines.append(f"{i + 1:2} {room:<{width}}  {marks}■")
    columns = "".join(f"{i + 1:<3}" for i in range(len(ROOMS)))
    return "\n".join([f"   {'':<{width}}  {columns}".rstrip(), *lines])


if __name__ == "__main__":
    print(drawing())
