"""Several sources: shares exact to a pair, drawn by the seed and by what the pairs say, and every source counted."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.mixtures import Source, apportioned, mixed, parse_sources, read_sources
from rwkv_dpo.data.prepare import prepare
from rwkv_dpo.data.sources import read_preferences
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.report.table import as_table


def test_names_and_shares_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_sources(["a.jsonl"]) == [Source("a.jsonl")]
    assert parse_sources(["a.jsonl:0.7", "owner/name:.3"]) == [Source("a.jsonl", Fraction(7, 10)), Source("owner/name", Fraction(3, 10))]
    assert parse_sources(["C:\\a.jsonl", "b*.csv:x"]) == [Source("C:\\a.jsonl"), Source("b*.csv:x")]
    (tmp_path / "a:7").write_text("")
    assert parse_sources(["a:7", "b"]) == [Source("a:7"), Source("b")]
    for given_, message in (
        (["a:1", "b"], "--source a:1 b: either all have a share, as in NAME:0.7, or none"),
        (["a:1"], "--source a:1: a share is one of several sources"),
        (["a:1", "a:2"], "--source a: is named twice"),
        (["a:1", "b:0.0"], "--source b:0.0: a share is above 0"),
    ):
        with pytest.raises(InputError, match=message):
            parse_sources(given_)


@given(st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 999)), min_size=2, max_size=5))
def test_shares_are_exact_to_a_pair_and_as_many_as_there_are(given_):
    available, weights = zip(*given_, strict=True)
    shares = [Fraction(weight, 1000) for weight in weights]
    counts = apportioned(available, shares)
    total = sum(counts)
    parts = [share / sum(shares) for share in shares]
    assert all(n <= there for n, there in zip(counts, available, strict=True))
    assert all(abs(n - total * part) < 1 for n, part in zip(counts, parts, strict=True))
    # One more pair would be more than some source has.
    assert any((total + 1) * part > there for there, part in zip(available, parts, strict=True))


def written(path, name, n):
    rows = [{"prompt": f"{name} {i}", "chosen": "yes", "rejected": "no"} for i in range(n)]
    rows[0]["rejected"] = "yes"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def mixture(texts, seed=0):
    sources = parse_sources([str(text) for text in texts])
    made = prepare(read_sources(sources, read_preferences), WorldTokenizer(), 64, "chat", seed)
    return mixed(made, sources, seed)


def prompts(prepared):
    decode = WorldTokenizer().decode
    return [decode(prepared.pairs.pair(i)[0].tolist()) for i in range(len(prepared.pairs))]


def test_every_source_is_counted_and_gives_its_share(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    rows = written(a, "A", 41)
    written(b, "B", 11)
    prepared, found = mixture([f"{a}:0.7", f"{b}:0.3"])
    assert found == {
        str(a): {"read": 41, "kept": 40, "dropped": {"identical answers": 1}, "share": 0.7, "pairs": 23},
        str(b): {"read": 11, "kept": 10, "dropped": {"identical answers": 1}, "share": 0.3, "pairs": 10},
    }
    drawn = prompts(prepared)
    assert [sum(f"User: {name} " in prompt for prompt in drawn) for name in "AB"] == [23, 10]
    assert prepared.report.refused[0] == (f"{a}: line 1", "identical answers")
    assert "70.0%" in as_table(sources=found)
    # Neither another order of the rows nor 7 : 3 in place of 0.7 : 0.3 changes what is drawn; another seed does.
    a.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    assert sorted(prompts(mixture([f"{a}:7", f"{b}:3"])[0])) == sorted(drawn)
    assert sorted(prompts(mixture([f"{a}:7", f"{b}:3"], seed=1)[0])) != sorted(drawn)


def test_without_shares_all_of_every_source_is_there(tmp_path):
    written(tmp_path / "a.jsonl", "A", 4)
    written(tmp_path / "b.jsonl", "B", 3)
    prepared, found = mixture([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert [one["pairs"] for one in found.values()] == [3, 2]
    assert len(prepared.pairs) == len(prepared.prompt_keys) == 5
    alone, none = mixture([tmp_path / "a.jsonl"])
    assert none == {}
    assert alone.report.refused == [("line 1", "identical answers")]


def test_a_source_with_a_share_and_no_pair_is_refused(tmp_path):
    written(tmp_path / "a.jsonl", "A", 4)
    written(tmp_path / "b.jsonl", "B", 1)
    with pytest.raises(InputError, match=r"--source .*b.jsonl:0.5: no usable pair among its 1 rows"):
        mixture([f"{tmp_path}/a.jsonl:0.5", f"{tmp_path}/b.jsonl:0.5"])
