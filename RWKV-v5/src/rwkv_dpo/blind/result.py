"""What votes say of two models: counts, a win rate with its interval, a test; as numbers, as rows to show, and as preference pairs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rwkv_dpo.blind.cards import Card

# What is called a difference.
_SIGNIFICANT = 0.05
_PARTS = ("kind", "language")
_PAIR_ROWS = {
    "held-out preference accuracy": ("logps/accuracies", "{:.3f}"), "held-out margin (nats)": ("logps/margins", "{:+.2f}"),
    "held-out reward accuracy": ("rewards/accuracies", "{:.3f}"), "held-out reward margin": ("rewards/margins", "{:+.3f}"),
}  # fmt: skip


def count(cards: Sequence[Card], choices: Mapping[int, str]) -> dict[str, Any]:
    """{"wins": [of the first model, of the second], "ties": n} of the votes by the numbers of their cards, counted from 1."""
    wins, ties = [0, 0], 0
    for number, choice in choices.items():
        if choice == "=":
            ties += 1
        else:
            wins[cards[number - 1].sides["AB".index(choice)]] += 1
    return {"wins": wins, "ties": ties}


def sign_test(wins: Sequence[int]) -> dict[str, Any]:
    """Of the votes that are no ties: the second model's share ("win_rate", None without votes), where it lies with 95 % confidence
    (Clopper and Pearson 1934), and the exact two-sided p of a sign test, that shares as unequal as these come about between equals."""
    from scipy.stats import binomtest  # takes most of a second

    if not sum(wins):
        return {"win_rate": None, "interval": [0.0, 1.0], "p": 1.0}
    test = binomtest(wins[1], sum(wins))
    interval = test.proportion_ci(0.95, method="exact")
    return {"win_rate": wins[1] / sum(wins), "interval": [float(interval.low), float(interval.high)], "p": float(test.pvalue)}


def result_of(
    names: Sequence[str], cards: Sequence[Card], choices: Mapping[int, str], pairs: Sequence[Mapping[str, float]] = ()
) -> dict[str, Any]:
    """result.json. pairs: of each model, what evaluate_pairs says."""
    counts = count(cards, choices)
    result: dict[str, Any] = {
        "models": list(names), "questions": sum(card.is_asked for card in cards), "judged": len(choices),
        "same_answers": sum(not card.is_asked for card in cards), **counts, **sign_test(counts["wins"]),
    }  # fmt: skip
    result |= {f"by_{part}": found for part in _PARTS if (found := _count_by(part, cards, choices))}
    if pairs:
        result["held_out"] = [with_margin(report) for report in pairs]
    return result


def _count_by(part: str, cards: Sequence[Card], choices: Mapping[int, str]) -> dict[str, dict[str, Any]]:
    """The counts of every kind or language that has votes, where the questions say so."""
    found: dict[str, dict[int, str]] = {}
    for number in sorted(choices, key=lambda n: getattr(cards[n - 1].question, part)):
        found.setdefault(getattr(cards[number - 1].question, part), {})[number] = choices[number]
    return {name: count(cards, votes) for name, votes in found.items() if name}


def with_margin(report: Mapping[str, float]) -> dict[str, float]:
    """What evaluate_pairs says, and the mean of chosen minus rejected, which it leaves to its readers."""
    return {**report, "logps/margins": report["logps/chosen"] - report["logps/rejected"]}


def shown(result: Mapping[str, Any]) -> dict[str, Any]:
    """{"models": [..], "rows": [[label, of the first model, of the second], ..], "lines": [..]}: the result in words, for any page."""
    first, second = result["wins"]
    rows = [["judged better", str(first), str(second)]]
    if result["win_rate"] is not None:
        (low, high), rate = result["interval"], result["win_rate"]
        rows.append(["win rate, ties aside", f"{100 - 100 * rate:.1f} %", f"{100 * rate:.1f} %"])
        rows.append(["95 % interval", *(f"{100 * least:.1f} to {100 * most:.1f} %" for least, most in ((1 - high, 1 - low), (low, high)))])
    for part in _PARTS:
        for name, of_part in result.get(f"by_{part}", {}).items():
            ties = f", {of_part['ties']} equal" if of_part["ties"] else ""
            rows.append([f"better: {name}{ties}", *map(str, of_part["wins"])])
    if held_out := result.get("held_out"):
        rows += [[label, *(form.format(of[name]) for of in held_out)] for label, (name, form) in _PAIR_ROWS.items() if name in held_out[0]]
    return {"models": result["models"], "rows": rows, "lines": list(_lines(result))}


def as_text(result: Mapping[str, Any]) -> str:
    """What shown says, as a table with lines below."""
    told = shown(result)
    table = [["", *told["models"]], *told["rows"]]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in table]
    return "\n".join([*lines, "", *told["lines"]])


def pairs_of(cards: Sequence[Card], choices: Mapping[int, str], system: str = "") -> Iterator[dict[str, str]]:
    """The votes as rows of preference data, ties left out."""
    for number, choice in choices.items():
        if choice != "=":
            card = cards[number - 1]
            chosen, rejected = (card.side(letter) for letter in (choice, "B" if choice == "A" else "A"))
            yield {"prompt": card.question.prompt, **({"system": system} if system else {}), "chosen": chosen, "rejected": rejected}


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    first, second = result["wins"]
    equal = f", {result['ties']} of them equal" if result["ties"] else ""
    yield f"{result['judged']} of {result['questions']} questions judged{equal}."
    if same := result["same_answers"]:
        yield f"{same} more had the same answer from both and {'was' if same == 1 else 'were'} not asked."
    p = f"sign test, exact, two-sided: p = {result['p']:.2g}"
    better = result["models"][second > first]
    yield f"{better} is judged better ({p})." if result["p"] < _SIGNIFICANT else f"The votes are too even to say which is better ({p})."
