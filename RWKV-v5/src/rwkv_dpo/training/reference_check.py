"""The check before the first step: do the pairs' reference log-probabilities come from the model that training starts from?"""

import contextlib
import logging
from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from typing_extensions import override

from rwkv_dpo.data.pairs import PairSet
from rwkv_dpo.devices.device import COMPUTE_DTYPES
from rwkv_dpo.evaluation.scoring import score_pairs
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.training.module import DPOModule

log = logging.getLogger(__name__)

# The number of pairs checked, the shortest ones: both rounding errors and the deviation of another model grow with the square root of a
# pair's tokens.
N_CHECKED = 8
# Mean |margin|, nats, that rounding in fp32 explains. Between fp32 and bf16 a token's log-probability differed by 4 to 110 of bf16's unit
# roundoffs in random models of 2 to 24 layers. As many of fp32's, 2^-24, over 100 tokens make 7e-5; the rest is for deeper models,
# Mean |margin|, in nats, that rounding in fp32 explains. Between fp32 and bf16, a token's log-probability differed by 4 to 110 unit
# roundoffs of bf16 in random models of 2 to 24 layers. The same multiples of fp32's, 2^-24, over 100 tokens make 7e-5; the rest allows for
# deeper models, other libraries and log-probabilities that were stored in fp32.
FP32_ROUNDING = 1e-3
# In other arithmetic, rounding is measured on these pairs. They are few, and the reference has rounding errors of its own.
FACTOR = 4


class ReferenceCheck(pl.Callback):
    """Compares in the precision in which the reference was computed, whatever the run's is; in fp32 if that isn't known."""

    def __init__(self, pairs: PairSet, precision: str, is_recomputed: bool, batch_tokens: int, ld_alpha: float = 1.0) -> None:
        """precision: the run's. is_recomputed: the reference is the model that training starts from. batch_tokens: scored at once.
        ld_alpha: of the objective."""
        self.pairs, self.precision, self.is_recomputed, self.batch_tokens = pairs, precision, is_recomputed, batch_tokens
        self.ld_alpha = ld_alpha

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        if trainer.global_step:
            return  # resumed: the weights have changed since
        # Not earlier: --dpo_ref recompute has filled in the log-probabilities since.
        model, pairs = module.model, shortest(self.pairs)
        made_in = self.precision if self.is_recomputed else str(pairs.header.get("reference_precision", ""))
        in_halves = [name for name in ("fp16", "bf16") if any(p.dtype == COMPUTE_DTYPES[name] for p in model.parameters())]
        # The original's files don't say in which precision they were scored; bf16 is the coarsest.
        rounded_in = [made_in if made_in in COMPUTE_DTYPES else "bf16", *in_halves]
        compared_in = made_in if made_in in COMPUTE_DTYPES else "fp32"
        logps = {}
        for name in dict.fromkeys(("fp32", compared_in, *rounded_in, self.precision)):
            with _computing_in(model, name):
                logps[name] = score_pairs(model, pairs, self.batch_tokens, ld_alpha=self.ld_alpha)
        if not trainer.is_global_zero:
            return
        with np.errstate(invalid="ignore"):
            difference = logps[compared_in] - pairs.ref_logps
            mean = float(np.abs(difference[:, 0] - difference[:, 1]).mean())
            rounding = {name: float(np.sqrt(((logps[name] - logps["fp32"]) ** 2).sum(1).mean())) for name in logps}
        expected = max(FP32_ROUNDING, *(FACTOR * rounding[name] for name in rounded_in))
        of_steps = rounding[self.precision]
        in_steps = f"; training sees them in {self.precision}, with {of_steps:.1g} nats of rounding" if of_steps else ""
        log.info(
            "step 0: mean |margin| of %d short pairs %.2e nats (in %s; rounding explains up to %.1g%s)",
            len(pairs), mean, compared_in, expected, in_steps,
        )  # fmt: skip
        if not mean <= expected:
            log.warning(
                "the starting model is not the one that scored dpo_train_file (mean |margin| %.2g nats, rounding explains up to %.1g): "
                "DPO will measure rewards relative to another reference. --dpo_ref recompute uses the starting model; if this is what you "
                "want, ignore the warning.", mean, expected,
            )  # fmt: skip


def shortest(pairs: PairSet) -> PairSet:
    """Up to N_CHECKED of them, in their order."""
    return pairs.select(np.sort(np.argsort(pairs.lengths.sum(axis=1), kind="stable")[:N_CHECKED]).tolist())


@contextlib.contextmanager
def _computing_in(model: RWKV, precision: str) -> Iterator[None]:
    """Evaluate in one of COMPUTE_DTYPES; on a GPU, tf32 is allowed for tf32 only, not for fp32."""
    before, products = model.compute_dtype, torch.get_float32_matmul_precision()
    model.compute_dtype = COMPUTE_DTYPES[precision]
    if model.head.weight.device.type != "cpu":
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    model.eval()
    try:
        yield
    finally:
        model.train()
        model.compute_dtype = before
        torch.set_float32_matmul_precision(products)
