"""From preferences to pairs: write out, tokenize, cut, drop what cannot be learned from. Everything is counted.

No draw depends on the order of the rows or on other rows: the same prompt gets the same template and lands in the same split,
whatever file it stands in. Prompts that the cut makes the same are the exception: they share a split.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from rwkv_dpo.data import tokenizer as world
from rwkv_dpo.data.pairs import Pair, PairSet, cut_pair, pack_pairs
from rwkv_dpo.data.preference import Dropped, Preference
from rwkv_dpo.data.prompts import MODES, Templates, load_templates, render
from rwkv_dpo.data.trees import grow


@dataclass(frozen=True)
class NextSource:
    """Among preferences: those that follow come from that source."""

    name: str


@dataclass
class Report:
    """What became of the rows. `refused` holds (where, reason) of every row that was left out, `starts` where sources begin, as (name,
    rows read, kept, refused before it)."""

    n_read: int = 0
    n_kept: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    starts: list[tuple[str, int, int, int]] = field(default_factory=list)
    n_cut_prompts: int = 0
    n_cut_answers: int = 0
    n_cut_tokens: int = 0

    def counts(self) -> dict[str, Any]:
        """The counts as JSON values, the refused rows per reason."""
        return {
            "read": self.n_read,
            "kept": self.n_kept,
            "dropped": dict(Counter(reason for _, reason in self.refused)),
            "cut_prompts": self.n_cut_prompts,
            "cut_answers": self.n_cut_answers,
            "cut_tokens": self.n_cut_tokens,
        }

    def by_source(self) -> dict[str, dict[str, Any]]:
        """{"a.jsonl": {"read": 9, "kept": 8, "dropped": {"tie": 1}}} for every source that was announced, in their order."""
        ends = [*(start[1:] for start in self.starts[1:]), (self.n_read, self.n_kept, len(self.refused))]
        found = {}
        for (name, n_read, n_kept, n_refused), (read_to, kept_to, refused_to) in zip(self.starts, ends, strict=False):
            reasons = Counter(reason for _, reason in self.refused[n_refused:refused_to])
            found[name] = {"read": read_to - n_read, "kept": kept_to - n_kept, "dropped": dict(reasons)}
        return found

    def dropped_rows(self, n: int = 5) -> dict[str, list[str]]:
        """The first n rows that were left out for each reason."""
        places: dict[str, list[str]] = {}
        for where, reason in self.refused:
            places.setdefault(reason, []).append(where)
        return {reason: rows[:n] for reason, rows in places.items()}


@dataclass(frozen=True)
class Prepared:
    """Unscored pairs, the key of each one's prompt (pairs with the same key belong into one split), and the report."""

    pairs: PairSet
    prompt_keys: list[str]
    report: Report

    def select(self, rows: Sequence[int]) -> "Prepared":
        """The pairs of those rows."""
        return Prepared(self.pairs.select(rows), [self.prompt_keys[row] for row in rows], self.report)

    def grown(self, tree_tokens: int) -> "Prepared":
        """The pairs in trees of up to so many tokens (trees.grow). Pairs that are related belong into one split."""
        pairs, before, relatives = grow(self.pairs, tree_tokens)
        least: dict[int, str] = {}
        for i, relative in zip(before, relatives, strict=True):
            least[relative] = min(self.prompt_keys[i], least.get(relative, self.prompt_keys[i]))
        return Prepared(pairs, [least[relative] for relative in relatives], self.report)


def prepare(
    preferences: Iterable[Preference | Dropped | NextSource], tokenizer: world.WorldTokenizer, ctx_len: int, templates: str, seed: int
) -> Prepared:
    """Make pairs of at most ctx_len tokens, prompt + longer answer. `templates` is what prompts.load_templates takes.

    A row is refused, with its reason, when its prompt or an answer is empty, its answers are the same (before or after the cut),
    no token of its last turn fits, or it repeats an earlier row.
    """
    written = load_templates(templates)
    report = Report()
    kept: list[list[np.ndarray]] = []
    scores: list[tuple[float, float]] = []
    prompt_keys: list[str] = []
    seen: set[bytes] = set()
    merged = _MergedKeys()
    source = 0
    for preference, tokens in _tokenized(preferences, tokenizer, written, seed):
        if isinstance(preference, NextSource):
            report.starts.append((preference.name, report.n_read, len(kept), len(report.refused)))
            continue
        report.n_read += 1
        if isinstance(preference, Dropped):
            report.refused.append((preference.where, preference.reason))
            continue
        assert tokens is not None, "of every preference"
        source += _digest(preference)
        *pair, n_prompt_cut, n_chosen_cut, n_rejected_cut = cut_pair(*tokens.pair, ctx_len, tokens.longest)
        n_answers_cut = n_chosen_cut + n_rejected_cut
        content = hashlib.blake2b(b"/".join(row.tobytes() for row in pair), digest_size=16).digest()
        is_prompt_lost = n_prompt_cut > 0 and len(pair[0]) <= tokens.n_cue
        key = prompt_key(preference)
        reason = "duplicate" if content in seen else _unusable_because(preference, pair, is_prompt_lost, n_answers_cut)
        if reason in (None, "duplicate"):
            merged.add(key, pair[0])
        if reason:
            report.refused.append((preference.where, reason))
            continue
        seen.add(content)
        kept.append(pair)
        scores.append(preference.scores or (np.nan, np.nan))
        prompt_keys.append(key)
        report.n_cut_prompts += n_prompt_cut > 0
        report.n_cut_answers += n_answers_cut > 0
        report.n_cut_tokens += n_prompt_cut + n_answers_cut
    report.n_kept = len(kept)
    header = {
        "source_id": f"{source % 2**128:032x}",
        "tokenizer": world.NAME,
        "templates": templates if templates in MODES else asdict(written),
        "ctx_len": ctx_len,
        "seed": seed,
        "counts": report.counts(),
    }
    return Prepared(pack_pairs(kept, header=header, scores=np.array(scores)), [merged.least(key) for key in prompt_keys], report)


def _digest(preference: Preference) -> int:
    """Of what a row says. The sum over rows is the same in any order."""
    texts = (preference.system, *preference.turns, preference.chosen, preference.rejected)
    return int.from_bytes(hashlib.blake2b(repr(texts).encode(), digest_size=16).digest(), "little")


class _MergedKeys:
    """Prompt keys of which some stand for the same tokens: cut from their left, different prompts may end up alike."""

    def __init__(self) -> None:
        self._lesser: dict[str, str] = {}  # a key that was merged -> a lesser one
        self._first: dict[bytes, str] = {}  # by the tokens: the first key that stood for them

    def add(self, key: str, tokens: np.ndarray) -> None:
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        least, other = self.least(key), self.least(self._first.setdefault(digest, key))
        if least != other:
            self._lesser[max(least, other)] = min(least, other)

    def least(self, key: str) -> str:
        """The least of all keys that are merged with this one."""
        while key in self._lesser:
            key = self._lesser[key]
        return key


def prompt_key(preference: Preference) -> str:
    """The dialogue without its system message, letter case and spacing: prompts that differ in those alone are one prompt."""
    return "\n".join(" ".join(turn.casefold().split()) for turn in preference.turns)


class _Tokens(NamedTuple):
    """Of a preference, before the cut. longest: of the answers of its ranking; n_cue: of the prompt's cue."""

    pair: Pair
    longest: int
    n_cue: int


def _tokenized(
    preferences: Iterable[Preference | Dropped | NextSource], tokenizer: world.WorldTokenizer, templates: Templates, seed: int
) -> Iterator[tuple[Preference | Dropped | NextSource, _Tokens | None]]:
    """Each with its tokens, None for what is no preference."""
    def encoded(text: str) -> np.ndarray:
        return np.asarray(tokenizer.encode(text), dtype=np.int32)

    numbers = itertools.count()

    def ranking_of(one: Preference | Dropped | NextSource) -> object:
        # Rows that happen to stand beside each other have nothing to do with one another.
        return one.ranking if isinstance(one, Preference) and one.ranking else next(numbers)

    for _, run in itertools.groupby(preferences, ranking_of):
        together = list(run)
        if not isinstance(together[0], Preference):
            yield from ((one, None) for one in together)
            continue
        texts = [render(one, templates, seed) for one in together if isinstance(one, Preference)]
        # More than one where some of the answers think.
        prompts = {(text.prompt, text.cue): (encoded(text.prompt), len(encoded(text.cue))) for text in texts}
        answers = {text: encoded(text) for both in texts for text in (both.chosen, both.rejected)}
        longest = max(map(len, answers.values()))
        for one, both in zip(together, texts, strict=True):
            prompt, n_cue = prompts[both.prompt, both.cue]
            yield one, _Tokens((prompt, answers[both.chosen], answers[both.rejected]), longest, n_cue)


def _unusable_because(preference: Preference, pair: Sequence[np.ndarray], is_prompt_lost: bool, n_answers_cut: int) -> str | None:
    _, chosen, rejected = pair
    if not preference.turns[-1].strip():
        return "empty prompt"
    if not len(chosen) or not len(rejected):
        return "empty answer"
    if is_prompt_lost:
        return "prompt does not fit"
    if np.array_equal(chosen, rejected):
        return "identical answers after the cut" if n_answers_cut else "identical answers"
    return None
