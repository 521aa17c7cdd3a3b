"""The pair files that a run names: opened and checked, and what there is to be told of them at its start."""

from rwkv_dpo.data.held_out import check_held_out
from rwkv_dpo.data.pair_files import open_pairs
from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.run.config import RunConfig
from rwkv_dpo.training.reference import check_scored


def open_pair_files(config: RunConfig, vocab_size: int) -> tuple[PairSet | None, PairSet | None]:
    """--dpo_train_file and --dpo_valid_file, as far as the run uses them. vocab_size 0: not known yet."""

    def opened(flag: str, is_used: bool) -> PairSet | None:
        if not is_used:
            return None
        pairs = open_pairs(flag, getattr(config, flag), vocab_size or None)
        check_scored(config, flag, pairs)
        return pairs

    return opened("dpo_train_file", config.uses_pairs), opened("dpo_valid_file", bool(config.dpo_valid_file))


def doubts(config: RunConfig, pairs: PairSet | None, valid: PairSet | None) -> list[str]:
    """What to warn of before the run begins. InputError for held-out pairs that are none."""
    lines = []
    n_at_once = config.micro_bsz * config.world_size
    if pairs is not None and n_at_once > len(pairs):
        lines.append(
            f"--micro_bsz {config.micro_bsz}{f' on {config.world_size} devices' if config.world_size > 1 else ''}: a micro-batch has more "
            f"pairs than the {len(pairs)} of {config.dpo_train_file}, so that some count in it several times"
        )
    if pairs is not None and valid is not None:
        names = (f"--{flag} {getattr(config, flag)}" for flag in ("dpo_valid_file", "dpo_train_file"))
        lines.append(check_held_out(valid, pairs, *names))
    return [line for line in lines if line]
