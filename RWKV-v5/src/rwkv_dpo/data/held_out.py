"""Whether pairs that are called held-out really are."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.pairs import PairSet


def overlap(held_out: PairSet, trained: PairSet) -> tuple[int, int]:
    """How many pairs of held_out are among those trained on, and how many have a prompt that is; compared token by token."""
    known = {digest for both in _digests(trained) for digest in both}
    same = [(pair in known, prompt in known) for pair, prompt in _digests(held_out)]
    return sum(pair for pair, _ in same), sum(prompt for _, prompt in same)


def _digests(pairs: PairSet) -> Iterator[tuple[bytes, bytes]]:
    """Digests of each pair and of its prompt alone; the numbers of tokens keep rows distinct."""
    for i in range(len(pairs)):
        rows = pairs.pair(i)
        prompt = hashlib.blake2b(rows[0].tobytes(), digest_size=16)
        whole = prompt.copy()
        whole.update(b"".join(len(row).to_bytes(8, "little") + row.tobytes() for row in rows[1:]))
        yield whole.digest(), prompt.digest()


def refuse_mixture(held_out: Mapping[str, Any], trained: Mapping[str, Any], name: str, trained_name: str) -> None:
    """InputError if the headers of two files say that one source was split into them in two different ways."""
    ids, sources = ([str(header.get(key) or "") for header in (held_out, trained)] for key in ("preparation_id", "source_id"))
    if all(ids) and ids[0] != ids[1] and sources[0] == sources[1]:
        refuse(
            f"{name} and {trained_name} are from two preparations of the same preferences ({ids[0]:.8}... and {ids[1]:.8}...): prompts "
            "that one holds out may be in the other; use the files of one run of prepare_pairs.py"
        )


def check_held_out(held_out: PairSet, trained: PairSet, name: str, trained_name: str) -> str:
    """A warning, "" if there is nothing to warn of. InputError for a mixture, or if nothing is held out."""
    refuse_mixture(held_out.header, trained.header, name, trained_name)
    n_pairs, n_prompts = overlap(held_out, trained)
    if n_pairs == len(held_out) > 0:
        refuse(f"{name}: all of its {n_pairs:,} pairs are in {trained_name} too; nothing is held out")
    if not n_prompts:
        return ""
    return (
        f"{name} is not entirely held out: of its {len(held_out):,} pairs {n_prompts:,} have a prompt that is in {trained_name} too, and "
        f"{n_pairs:,} the answers as well"
    )
