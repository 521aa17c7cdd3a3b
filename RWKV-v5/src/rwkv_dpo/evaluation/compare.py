"""What checkpoints made of the same data, side by side: figures, 95 % intervals, and each one's difference to the first."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.evaluation.calibration import calibration
from rwkv_dpo.evaluation.divergence import WindowScores, perplexity
from rwkv_dpo.evaluation.intervals import mean_intervals
from rwkv_dpo.evaluation.lengths import by_length
from rwkv_dpo.evaluation.scoring import pair_means, prompt_numbers
from rwkv_dpo.objective.losses import Mixture

_N_BINS = 30
# Percentiles between which the histogram of margins has its bins; what is beyond counts in the outer ones.
_SHOWN = (0.5, 99.5)


class Scores(NamedTuple):
    """What one checkpoint made of all data, by the name of its file."""

    pairs: dict[str, np.ndarray]  # score_pairs
    corpora: dict[str, WindowScores]
    answers: dict[str, str]  # by prompt


def compare(
    names: Sequence[str], pairs: Mapping[str, PairSet], scores: Sequence[Scores], mixtures: Sequence[Mixture], with_kl: bool, seed: int
) -> list[dict[str, Any]]:
    """A report a column, of the checkpoint with that name, scored so, whose run minimises such a mixture: {"checkpoint": name, "pairs":
    {file: pair_figures}, "corpora": {file: corpus_figures}, "answers": [{"prompt": ..., "answer": ...}]}. The numbers of a file that is
    the only one of its kind, and the answer to the only prompt, stand in the report itself too."""
    reports: list[dict[str, Any]] = [{"checkpoint": name} for name in names]
    figures = {
        "pairs": {file: pair_figures(own, [one.pairs[file] for one in scores], mixtures, seed) for file, own in pairs.items()},
        "corpora": {file: corpus_figures([one.corpora[file] for one in scores], with_kl, seed) for file in scores[0].corpora},
    }
    for i, (report, own) in enumerate(zip(reports, scores, strict=True)):
        for kind, files in figures.items():
            of_column = {file: columns[i] for file, columns in files.items()}
            only = list(of_column.values()) if len(of_column) == 1 else []
            report.update({name: value for one in only for name, value in one.items() if isinstance(value, float)})
            report.update({kind: of_column} if of_column else {})
        answers = [{"prompt": prompt, "answer": answer} for prompt, answer in own.answers.items()]
        if answers:
            report.update({"answers": answers, **({"answer": answers[0]["answer"]} if len(answers) == 1 else {})})
    return reports


def pair_figures(pairs: PairSet, scores: Sequence[np.ndarray], mixtures: Sequence[Mixture], seed: int) -> list[dict[str, Any]]:
    """Of each column what score_pairs [n, 2] gave, and the losses of its run: the means of metrics.jsonl, "n_pairs", "n_prompts",
    intervals and differences as of _spread (resampled by prompts), "calibration", "lengths" and "margins" (a histogram whose bins all
    columns share). Rewards, and what is made of them, only of pairs that a reference has scored."""
    prompts = prompt_numbers(pairs)
    margins = [{"logps": one[:, 0] - one[:, 1]} for one in scores]
    if pairs.is_scored:
        for own, one, mixture in zip(margins, scores, mixtures, strict=True):
            rewards = mixture.options.beta * (one - pairs.ref_logps)
            own["rewards"] = rewards[:, 0] - rewards[:, 1]
    values = [{f"{key}/{name}": value for key, margin in own.items() for name, value in _outcomes(margin).items()} for own in margins]
    edges = _edges(np.concatenate([own["logps"] for own in margins]))
    found = []
    for one, mixture, own, spread in zip(scores, mixtures, margins, _spread(values, prompts, seed), strict=True):
        means = pair_means(one, pairs, mixture)
        if pairs.is_scored:
            means["dpo_beta"] = float(mixture.options.beta)
        else:
            means = {name: mean for name, mean in means.items() if not name.startswith(("rewards/", "ref_logps/"))}
        figures = {**means, "logps/margins": means["logps/chosen"] - means["logps/rejected"]}
        counts = {"n_pairs": len(pairs), "n_prompts": int(prompts.max()) + 1}
        calibrated = {"calibration": calibration(own["rewards"])} if pairs.is_scored else {}
        shown = {"edges": edges.tolist(), "pairs": _histogram(own["logps"], edges)}
        found.append({**figures, **counts, **spread, **calibrated, "lengths": by_length(pairs.lengths[:, 1:], own), "margins": shown})
    return found


def corpus_figures(scores: Sequence[WindowScores], with_kl: bool, seed: int) -> list[dict[str, Any]]:
    """Of each column: "corpus_loss", "corpus_perplexity", "n_windows", with_kl "kl" (to the first column, whose own is 0), and intervals
    and differences as of _spread, resampled by windows."""
    values = [{"corpus_loss": one.losses, **({"kl": one.divergences} if with_kl and i else {})} for i, one in enumerate(scores)]
    if len({len(one.losses) for one in scores}) == 1:
        spreads = _spread(values, np.arange(len(scores[0].losses)), seed)
    else:  # of several vocabularies
        spreads = [_spread([own], np.arange(len(own["corpus_loss"])), seed)[0] for own in values]
    found = []
    for own, spread in zip(values, spreads, strict=True):
        means = {name: float(value.mean()) for name, value in own.items()}
        means["corpus_perplexity"] = perplexity(means["corpus_loss"])
        found.append({**({"kl": 0.0} if with_kl else {}), **means, "n_windows": len(own["corpus_loss"]), **spread})
    return found


def _spread(values: Sequence[Mapping[str, np.ndarray]], groups: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """Of the values [n] of every column, by name: {"intervals": {"logps/margins": [0.1, 0.4]}, "differences": {"logps/margins": {"mean":
    0.2, "interval": [0.1, 0.3]}}}, the latter of columns after the first: theirs minus its, paired. An interval that is unknown is
    None."""
    first = values[0]
    tables = [dict(own) for own in values]
    # Subtracted row by row, not as sums: where two columns agree their difference is 0.
    apart = [{name: value - first[name] for name, value in own.items() if name in first and own is not first} for own in values]
    columns = [column for table in (*tables, *apart) for column in table.values()]
    intervals = mean_intervals(np.stack(columns, axis=1), groups, seed)
    bounds = iter([both.tolist() if np.isfinite(both).all() else None for both in intervals])
    found: list[dict[str, Any]] = [{"intervals": {name: next(bounds) for name in table}} for table in tables]
    for spread, table in zip(found, apart, strict=True):
        if table:
            spread["differences"] = {name: {"mean": float(x.mean()), "interval": next(bounds)} for name, x in table.items()}
    return found


def _outcomes(margins: np.ndarray) -> dict[str, np.ndarray]:
    # Of a model that is its own reference no reward is larger: it is right neither always nor never.
    is_right = (margins > 0).astype(np.float64) if margins.any() else np.full(len(margins), np.nan)
    return {"accuracies": is_right, "margins": margins}


def _edges(margins: np.ndarray) -> np.ndarray:
    known = margins[np.isfinite(margins)]
    low, high = np.percentile(known, _SHOWN) if len(known) else (0.0, 0.0)
    # Numbers that are all but equal lie around the middle of the bins.
    room = max(1.0, abs(low), abs(high))
    if high - low < 1e-9 * room:
        low, high = low - room / 2, high + room / 2
    return np.linspace(low, high, _N_BINS + 1)


def _histogram(margins: np.ndarray, edges: np.ndarray) -> list[int]:
    known = margins[np.isfinite(margins)]
    return np.histogram(np.clip(known, edges[0], edges[-1]), edges)[0].tolist()
