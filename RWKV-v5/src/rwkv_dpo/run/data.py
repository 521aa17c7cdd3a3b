"""What a run reads: corpus and pair files, opened, checked against one another, and described at its start."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rwkv_dpo.base.errors import refuse
from rwkv_dpo.batches.sampling import check_magic_prime
from rwkv_dpo.data.corpus import Corpus, open_corpus
from rwkv_dpo.data.corpus_names import name_corpus
from rwkv_dpo.data.held_out import check_held_out
from rwkv_dpo.data.pair_files import open_pairs
from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.data.prompt_files import read_prompts
from rwkv_dpo.data.tokenizer import NAME as WORLD_TOKENIZER
from rwkv_dpo.data.tokenizer import check_reads_text
from rwkv_dpo.run.settings import RunSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunData:
    """What a run reads; None for what it doesn't. valid, valid_corpus: held-out pairs and text; prompts: to be answered."""

    corpus: Corpus | None = None
    pairs: PairSet | None = None
    valid: PairSet | None = None
    valid_corpus: Corpus | None = None
    prompts: Sequence[str] = ()

    @property
    def pair_files(self) -> dict[str, PairSet]:
        """The pair sets by the flags that name them."""
        named = {"dpo_train_file": self.pairs, "dpo_valid_file": self.valid}
        return {flag: pairs for flag, pairs in named.items() if pairs is not None}


def tell_corpus(settings: RunSettings, given: frozenset[str]) -> RunSettings:
    """If --data_type was not given, say what was detected."""
    if not settings.objective.uses_corpus:
        return settings
    data = settings.data
    data_file, data_type = name_corpus(data.data_file, data.data_type if "data_type" in given else "")
    return settings.with_flags(data_file=data_file, data_type=data_type)


def open_data(settings: RunSettings, vocab_size: int) -> RunData:
    """Corpus, training pairs and held-out pairs, as far as the run uses them. vocab_size 0: not known yet. Raises InputError."""
    d, batches, load_model = settings.data, settings.batches, settings.model.load_model
    corpus = open_corpus(d.data_file, d.data_type, vocab_size, d.ctx_len, load_model) if settings.objective.uses_corpus else None
    if corpus is not None and batches.magic_prime:
        check_magic_prime(batches.magic_prime, corpus.n_tokens, d.ctx_len, batches.my_pile_shift)
    vocab_size = vocab_size or (corpus.vocab_size if corpus else 0)
    needs_scores = settings.objective.uses_reference and settings.objective.dpo_ref == "file"

    def opened(flag: str, path: str) -> PairSet:
        pairs = open_pairs(flag, path, vocab_size or None)
        if needs_scores and not pairs.is_scored:
            refuse(
                f"--{flag} {path}: its pairs have no reference log-probabilities, which --dpo_loss {settings.objective.dpo_loss} needs; "
                "prepare_pairs.py computes them, and so does --dpo_ref recompute, with the model that training starts from"
            )
        return pairs

    pairs = opened("dpo_train_file", d.dpo_train_file) if settings.objective.uses_pairs else None
    if pairs is not None:
        check_fits(batches.batch_tokens, pairs, d.dpo_train_file)
    valid = opened("dpo_valid_file", d.dpo_valid_file) if d.dpo_valid_file else None
    data = RunData(corpus, pairs, valid, open_valid_corpus(settings, vocab_size), open_prompts(settings, vocab_size))
    if corpus is not None and corpus.characters:
        _refuse_world_pairs(settings, corpus, data)
    return data


def check_fits(batch_tokens: int, pairs: PairSet, path: str) -> None:
    """Refuse a --batch_tokens that is smaller than a sample of the --dpo_train_file `path`."""
    tokens = pairs.tree_tokens
    longest = int(tokens.argmax())
    if batch_tokens and tokens[longest] > batch_tokens:
        first, *others = (row + 1 for row in pairs.tree(longest))
        rows = f"the tree of rows {first} to {others[-1]}" if others else f"row {first}"
        refuse(
            f"--batch_tokens {batch_tokens}: {rows} of --dpo_train_file {path} has {tokens[longest]} tokens; at least that many are "
            "accepted"
        )


def open_valid_corpus(settings: RunSettings, vocab_size: int) -> Corpus | None:
    """The held-out corpus. InputError for a character-level one, whose numbers only its own training corpus defines."""
    d = settings.data
    if not d.valid_data_file:
        return None
    corpus = open_corpus(*name_corpus(d.valid_data_file, d.valid_data_type), vocab_size, d.ctx_len, settings.model.load_model)
    if corpus.characters and not settings.model.load_model:
        refuse(
            f"--valid_data_file {d.valid_data_file}: text becomes numbered characters, but the model is from --load_model; tokens "
            "(binidx) are accepted"
        )
    return corpus


def open_prompts(settings: RunSettings, vocab_size: int) -> Sequence[str]:
    """The prompts of --sample_prompts. InputError if the model has no World vocabulary to read them with."""
    path = settings.held_out.sample_prompts
    if not path:
        return ()
    if vocab_size:
        check_reads_text(vocab_size, f"--sample_prompts {path}", "the model")
    return [row.prompt for row in read_prompts("--sample_prompts", Path(path))]


def _refuse_world_pairs(settings: RunSettings, corpus: Corpus, data: RunData) -> None:
    for flag, pairs in data.pair_files.items():
        if pairs.header.get("tokenizer") == WORLD_TOKENIZER:
            refuse(
                f"--{flag} {getattr(settings.data, flag)}: its tokens are the World tokenizer's, and {corpus.source} becomes "
                f"{corpus.how}; with --vocab_size 65536 both are read the same way"
            )


def doubts(settings: RunSettings, data: RunData) -> list[str]:
    """What to warn of before the run begins. InputError for held-out pairs that are all trained on."""
    lines, files = [], settings.data
    micro_bsz, world_size = settings.batches.micro_bsz, settings.devices.world_size
    if data.pairs is not None and settings.length.samples > data.pairs.n_trees:
        what = "pairs" if data.pairs.n_trees == len(data.pairs) else "trees"
        lines.append(
            f"--micro_bsz {micro_bsz}{f' on {world_size} devices' if world_size > 1 else ''}: a micro-batch has more {what} than the "
            f"{data.pairs.n_trees} of {files.dpo_train_file}, so some are in it more than once"
        )
    if data.pairs is not None and data.valid is not None:
        names = (f"--{flag} {getattr(files, flag)}" for flag in ("dpo_valid_file", "dpo_train_file"))
        lines.append(check_held_out(data.valid, data.pairs, *names))
    return [line for line in lines if line]


def tell_differences(settings: RunSettings, pair_files: dict[str, PairSet], loaded_sha256: str) -> None:
    """A warning for each pair file that was truncated to another --ctx_len, or, with --dpo_ref file, scored by another checkpoint than
    --load_model, whose sha256 is given ("" without one), or by one in another --quant format."""
    ctx_len, load_model = settings.data.ctx_len, settings.model.load_model
    for flag, pairs in pair_files.items():
        name = f"--{flag} {getattr(settings.data, flag)}"
        cut_to = pairs.header.get("ctx_len", ctx_len)
        if cut_to != ctx_len:
            log.warning(
                "%s was truncated to a ctx_len of %s, training has --ctx_len %d; the pairs are used unchanged", name, cut_to, ctx_len
            )
        scored_by = pairs.header.get("reference_sha256")
        # A continued run has trained since then, but its reference has not.
        if not scored_by or settings.objective.dpo_ref != "file" or settings.epochs.epoch_begin:
            continue
        if scored_by != loaded_sha256:
            start = f"--load_model {load_model} ({loaded_sha256[:12]}...)" if load_model else "initial weights"
            log.warning(
                "%s was scored by another file (sha256 %.12s...) than training starts from, %s; --dpo_ref recompute takes the starting "
                "model as the reference", name, scored_by, start,
            )  # fmt: skip
        elif (scored_in := pairs.header.get("reference_quant", "none")) != settings.tuning.quant:
            log.warning(
                "%s was scored with --quant %s, training has --quant %s, which is a different model; --dpo_ref recompute takes the "
                "starting model as the reference, or score with prepare_pairs.py --quant", name, scored_in, settings.tuning.quant,
            )  # fmt: skip
