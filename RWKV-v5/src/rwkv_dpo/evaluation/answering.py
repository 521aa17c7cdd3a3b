"""Checkpoints that answer prompts: loaded, with an adapter or without, and asked many prompts at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from rwkv_dpo.data.prompt_files import as_question
from rwkv_dpo.data.tokenizer import WorldTokenizer, check_reads_text
from rwkv_dpo.devices.device import COMPUTE_DTYPES
from rwkv_dpo.evaluation.generate import Sampling, answers
from rwkv_dpo.model.checkpoint import load_model
from rwkv_dpo.model.rwkv import RWKV
from rwkv_dpo.tuning.tuning import load_tuned

# Prompts whose answers are drawn together.
BATCH = 16


def load_speaker(
    checkpoint: str | Path, tuned: str | Path, any_base: bool, device: torch.device, precision: str, wkv_backend: str,
    quant: str = "none",
) -> RWKV:  # fmt: skip
    """The model of a checkpoint, with the adapter or state `tuned` on it where one is named. quant: as --quant. InputError for a
    vocabulary that is smaller than the World tokenizer's."""
    held = "none" if tuned else quant  # PiSSA takes its start out of matrices as they are
    model = load_model(checkpoint, device=device, compute_dtype=COMPUTE_DTYPES[precision], wkv_backend=wkv_backend, quant=held)
    check_reads_text(model.shape.vocab_size, f"--load_model {checkpoint}")
    if tuned:
        load_tuned(model, tuned, checkpoint, any_base, quant)
    return model.eval()


def answer_prompts(
    model: RWKV, prompts: Sequence[str], n: int, sampling: Sampling, max_tokens: int, seed: int, system: str = "", first: int = 0
) -> Iterator[list[list[str]]]:
    """n answers to each prompt, written out as training has it, a batch of BATCH prompts at a time. Each batch has a seed of its own, so
    that with first, a multiple of BATCH, those from there on are what they would be after the others."""
    written = [as_question(prompt, system) for prompt in prompts]
    tokenizer = WorldTokenizer()
    for start in range(first, len(prompts), BATCH):
        yield answers(model, tokenizer, written[start : start + BATCH], n, sampling, max_tokens, seed + start)
