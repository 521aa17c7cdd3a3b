"""What an evaluation reads, opened and held against every checkpoint's vocabulary before a model is loaded."""

from collections.abc import Iterable, Mapping, Sequence

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.data.corpus import Corpus, open_corpus
from rwkv_dpo.data.corpus_names import name_corpus
from rwkv_dpo.data.pair_files import open_pairs
from rwkv_dpo.data.pairs import PairSet, check_pairs
from rwkv_dpo.data.text_corpus import vocabulary_of
from rwkv_dpo.model.checkpoint import read_checkpoint, shape_of


def vocab_sizes(checkpoints: Iterable[str]) -> dict[str, int]:
    """Of each file, told by the shapes of its weights. InputError for one that is no checkpoint."""
    return {path: shape_of(read_checkpoint(path), path).vocab_size for path in dict.fromkeys(checkpoints)}


def open_pair_files(names: Sequence[str], sizes: Mapping[str, int]) -> dict[str, PairSet]:
    """Pairs by the name of their file. InputError for a file that is named twice or isn't one, or has tokens outside of a vocabulary."""
    _refuse_twice("pairs", names)
    found = {name: open_pairs("pairs", name) for name in names}
    for name, pairs in found.items():
        check_pairs(pairs, f"--pairs {name}", min(sizes.values()))
    return found


def open_corpora(
    names: Sequence[str], types: Sequence[str], ctx_len: int, sizes: Mapping[str, int], one_vocabulary: bool
) -> dict[str, dict[str, Corpus]]:
    """Corpora by the checkpoint that reads them and the name of their file, each once for all checkpoints of one vocabulary. types: of
    data, one for all files, one for each, or none. InputError as of open_corpus, and with one_vocabulary where there are several."""
    _refuse_twice("data_file", names)
    if len(types) not in (0, 1, len(names)):
        refuse(f"--data_type: {len(types)} of them for {len(names)} files; one for all is accepted, or one for each file")
    opened: dict[tuple[str, int, str], Corpus] = {}
    found: dict[str, dict[str, Corpus]] = {path: {} for path in sizes}
    for name, data_type in zip(names, types if len(types) == len(names) else [*types, ""][:1] * len(names), strict=True):
        for path, size in sizes.items():
            key = (name, size, vocabulary_of(path)[1])
            if key not in opened:
                opened[key] = open_corpus(*name_corpus(name, data_type), size, ctx_len, path)
            found[path][name] = opened[key]
            first, corpus = next(iter(sizes)), opened[key]
            if one_vocabulary and _vocabulary(corpus) != _vocabulary(found[first][name]):
                refuse(f"--data_file {name}: {path} reads it with another vocabulary than {first}, so that there is no KL divergence "
                       "between them; --kl 0 leaves it out")  # fmt: skip
    return found


def _vocabulary(corpus: Corpus) -> tuple[int, str]:
    return corpus.vocab_size, corpus.characters


def _refuse_twice(flag: str, names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            refuse(f"--{flag} {name}: named twice")
