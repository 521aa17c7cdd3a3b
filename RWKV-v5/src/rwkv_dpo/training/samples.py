"""--sample_prompts: what the model answers before the first step and at every evaluation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from typing_extensions import override

from rwkv_dpo.data.prompt_files import as_question
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.evaluation.generate import Sampling, answers
from rwkv_dpo.files.json_text import as_json
from rwkv_dpo.optimizer.length import RunLength
from rwkv_dpo.training.halt import Halt
from rwkv_dpo.training.module import DPOModule
from rwkv_dpo.training.validation import AfterEvaluation, HeldOut, when


@dataclass(frozen=True)
class Prompts:
    """The prompts, and how answers are drawn."""

    prompts: Sequence[str]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int


class Samples(AfterEvaluation):
    """One line of samples.jsonl before the first step and at every evaluation: each prompt with the answer of the model that training
    started from (base; null for a prompt that it did not get) and of the current one (now), drawn in one batch with the same seed."""

    def __init__(self, asked: Prompts, held_out: HeldOut, length: RunLength, folder: Path, halt: Halt) -> None:
        super().__init__(held_out)
        self.asked, self.length, self.halt = asked, length, halt
        self.path = folder / "samples.jsonl"
        self.tokenizer = WorldTokenizer()
        self.base: dict[str, str] = {}

    @override
    def on_train_start(self, trainer: pl.Trainer, module: DPOModule) -> None:  # type: ignore[override]
        # An evaluation before the first step is of the model that answers here anyway.
        self.seen = self.held_out.record
        has_begun = trainer.strategy.broadcast(self.path.exists())
        if has_begun and trainer.is_global_zero:
            lines = self.path.read_text().splitlines()
            self.base = {sample["prompt"]: sample["base"] for line in lines for sample in json.loads(line)["samples"]}
        if not has_begun:
            self._write(trainer, module)

    @override
    def on_evaluation(self, trainer: pl.Trainer, module: DPOModule, record: dict[str, Any]) -> None:
        self._write(trainer, module)

    def _write(self, trainer: pl.Trainer, module: DPOModule) -> None:
        # If ranks share the sharded weights, each has to make the same calls.
        if not (trainer.is_global_zero or getattr(trainer.strategy, "zero_stage_3", False)):
            return
        asked = self.asked
        module.model.eval()
        found = answers(
            module.model, self.tokenizer, [as_question(prompt) for prompt in asked.prompts], 1,
            Sampling(asked.temperature, asked.top_p), asked.max_tokens, asked.seed,
        )  # fmt: skip
        module.model.train()
        now = {prompt: texts[0] for prompt, texts in zip(asked.prompts, found, strict=True)}
        if not (self.base or trainer.global_step):
            self.base = now
        samples = [{"prompt": prompt, "base": self.base.get(prompt), "now": answer} for prompt, answer in now.items()]
        if trainer.is_global_zero:
            self.halt.append(self.path, as_json({**when(trainer, self.length), "samples": samples}, ensure_ascii=False) + "\n")
