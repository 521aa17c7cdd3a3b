"""The tables of docs/coming-from.md, from run/foreign_flags.py: `python tests/foreign_tables.py NAME` prints one of them."""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "RWKV-v5" / "src"))

from rwkv_dpo.run.foreign_flags import ANY, FLAGS, REFUSED, VALUES


def same() -> str:
    """Our flags, and what others call them."""
    named: dict[str, list[str]] = {}
    for name, here in FLAGS.items():
        if here.same:
            named.setdefault(here.same, []).append(f"`--{name}`")
    return _table(("here", "elsewhere"), [(f"`--{ours}`", ", ".join(names)) for ours, names in named.items()])


def others() -> str:
    """Names that share an answer, the values that are accepted, and the answer."""
    sharing: dict[int, list[str]] = {}
    answers = {id(here): here for here in FLAGS.values() if not here.same}
    for name, here in FLAGS.items():
        if not here.same:
            sharing.setdefault(id(here), []).append(f"`--{name}`")
    rows = []
    for key, names in sharing.items():
        here = answers[key]
        accepted = ["any value" if value == ANY else f"`{value}`" for value in _one_of_each(here.neutral)]
        accepted += [f"`{value}`: `{here.values[value]}`" for value in _one_of_each(tuple(here.values))]
        rows.append((", ".join(names), ", ".join(accepted), here.words))
    return _table(("elsewhere", "accepted", "here"), rows)


def values() -> str:
    """Values of our own flags as others spell them, and those that are refused."""
    rows = [
        (f"`--{flag}`", ", ".join(f"`{there}`" for there, here in spelled.items() if here == ours and there), f"`{ours}`")
        for flag, spelled in VALUES.items() for ours in dict.fromkeys(spelled.values())
    ]  # fmt: skip
    for flag, refused in REFUSED.items():
        for words in dict.fromkeys(refused.values()):
            rows.append((f"`--{flag}`", ", ".join(f"`{there}`" for there, why in refused.items() if why == words), f"refused: {words}"))
    return _table(("flag", "elsewhere", "here"), rows)


def _one_of_each(accepted: Sequence[str]) -> list[str]:
    """Without the other spellings of true and false."""
    return [value for value in accepted if value and not (value in ("1", "yes") and "true" in accepted)
            and not (value in ("0", "no", "none") and "false" in accepted)]  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(cells)} |" for cells in rows)])


if __name__ == "__main__":
    print({"same": same, "others": others, "values": values}[sys.argv[1]]())
