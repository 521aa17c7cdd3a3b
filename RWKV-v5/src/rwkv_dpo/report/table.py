"""The figures of a preparation as lines of text."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rwkv_dpo.data.preference import Notes


def no_pair_of(source: str | Path, notes: Notes) -> str:
    """What to say of rows none of which became a pair."""
    return f"{source}: no usable pair among its {notes.n_rows:,} rows" + (f"; the first is {notes.first_row}" if notes.first_row else "")


def as_table(
    counts: Mapping[str, Any] | None = None,
    looked: Mapping[str, Any] | None = None,
    reference: Mapping[str, Any] | None = None,
    files: Mapping[str, Mapping[str, Any]] | None = None,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The parts that are given, as lines of text. counts: of prepare.Report; sources: of mixtures.mixed; looked: of look.look; files:
    {"trainset.save": {"pairs": 8, "sha256": ...}}."""
    lines: list[str] = []
    if counts:
        n_dropped = counts["read"] - counts["kept"]
        lines += [f"{name:<34}{n:>9,}" for name, n in (("rows read", counts["read"]), ("kept", counts["kept"]), ("dropped", n_dropped))]
        lines += [f"  {reason:<32}{n:>9,}" for reason, n in counts["dropped"].items()]
        cuts = (("prompts cut", "cut_prompts"), ("pairs with an answer cut", "cut_answers"), ("tokens cut", "cut_tokens"))
        lines += [f"{name:<34}{counts[key]:>9,}" for name, key in cuts]
    if sources:
        has_shares = any("share" in row for row in sources.values())
        lines.append(_columns("sources", ("rows read", "kept", "share", "pairs") if has_shares else ("rows read", "kept")))
        for name, row in sources.items():
            share = (f"{row['share']:.1%}", f"{row['pairs']:,}") if has_shares else ()
            lines.append(_columns(f"  {name}", (f"{row['read']:,}", f"{row['kept']:,}", *share)))
    if looked:
        lines += _looked(looked)
    if reference:
        answers = {name: row for name, row in reference.items() if isinstance(row, Mapping)}
        lines.append(_columns("reference log-probability", (name.replace("_", " ") for name in next(iter(answers.values())))))
        lines += [_columns(f"  {name}", (f"{value:,.2f}" for value in row.values())) for name, row in answers.items()]
        lines.append(f"{'ranked correctly by the reference':<34}{reference['ranked_right']:>9.1%}")
    if files:
        lines += [f"{name:<34}{file['pairs']:>9,} pairs  sha256 {file['sha256']}" for name, file in files.items()]
    return "\n".join(lines)


def _looked(looked: Mapping[str, Any]) -> list[str]:
    lengths, trees, near = looked["lengths"], looked["trees"], looked["near_duplicates"]
    lines = [_columns("tokens", next(iter(lengths.values())))]
    lines += [_columns(f"  {name.replace('_', ' ')}", (f"{n:,}" for n in row.values())) for name, row in lengths.items()]
    lines.append(f"{'trees':<34}{trees['trees']:>9,}, with {trees['answers']:,} answers; the largest of {trees['most_tokens']:,} tokens")
    longer, gaps = looked["preferences"]["longer_preferred"], looked["preferences"]["gaps"]
    if longer is not None:
        lines.append(f"{'longer answer preferred':<34}{longer:>9.1%}")
    if gaps["pairs"]:
        lines.append(_columns("difference of scores", (name for name in gaps if name != "pairs")))
        lines.append(_columns(f"  of {gaps['pairs']:,} pairs", (f"{value:g}" for name, value in gaps.items() if name != "pairs")))
    lines += [f"{f'prompts mostly {script}':<34}{n:>9,}" for script, n in looked["scripts"].items()]
    for where in ("within", "between"):
        lines += [f"{f'nearly the same {where} {names}':<34}{n:>9,} of {near['prompts']:,} prompts" for names, n in near[where].items()]
    lines += [f"looks wrong: {doubt['pairs']:,} {doubt['what']}" for doubt in looked["doubts"]]
    return lines


def _columns(name: str, cells: Iterable[str]) -> str:
    return f"{name:<26}" + "".join(f"{cell:>17}" for cell in cells)
