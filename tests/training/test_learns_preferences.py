"""The demo's preferences are learned on prompts that training never sees, by adapters and by states alone.

The demo's corpus and pairs, with the 2,078 tokens that occur in them numbered from 0, which spares most of the head's work.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from rwkv_dpo.commands import train
from rwkv_dpo.data.corpus import open_corpus
from rwkv_dpo.data.pair_files import save_pairs
from rwkv_dpo.data.pairs import PairSet, pack_pairs
from rwkv_dpo.data.tokenizer import WorldTokenizer
from rwkv_dpo.evaluation.scoring import evaluate_pairs, score_pairs
from rwkv_dpo.model.checkpoint import load_model
from rwkv_dpo.objective.losses import dpo
from rwkv_dpo.tuning.tuning import load_tuned

ROOT = Path(__file__).resolve().parents[2]
RUN = ["--accelerator", "cpu", "--precision", "fp32", "--random_seed", "1", "--epoch_count", "1", "--epoch_save", "0", "--cpu_malloc", "0",
       "--enable_progress_bar", "False"]  # fmt: skip
pytestmark = pytest.mark.slow


class Demo(NamedTuple):
    folder: Path
    held_out: PairSet


def model_of(path):
    return load_model(path, device=torch.device("cpu"), compute_dtype=torch.float32)


def run(**flags):
    train.main([*RUN, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A small model of the demo's corpus, pairs scored by it for training, and held-out pairs of other prompts."""
    folder = tmp_path_factory.mktemp("demo")
    encode = WorldTokenizer().encode
    rows = [json.loads(line) for line in (ROOT / "RWKV-v5/demo/preferences.jsonl").read_text().splitlines()]
    texts = [(f"User: {row['prompt']}\n\nAssistant:", f" {row['chosen']}\n\n", f" {row['rejected']}\n\n") for row in rows]
    tokens = [tuple(np.array(encode(text)) for text in pair) for pair in texts]
    corpus = open_corpus(str(ROOT / "default_text_document"), "binidx", 65536, 128)
    stream = np.asarray(corpus.window(0, corpus.n_tokens))
    known = np.unique(np.concatenate([stream, *(part for pair in tokens for part in pair)]))
    np.searchsorted(known, stream).astype("<u2").tofile(folder / "corpus.bin")
    run(dpo=0, data_file=folder / "corpus.bin", data_type="uint16", vocab_size=len(known), ctx_len=128, proj_dir=folder / "base",
        n_layer=2, n_embd=64, head_size_a=32, micro_bsz=8, epoch_steps=100, lr_init=5e-3, lr_final=5e-4, warmup_steps=10)  # fmt: skip

    prompts = sorted({row["prompt"] for row in rows})
    unseen = set(np.random.default_rng(0).permutation(prompts)[: len(prompts) // 4].tolist())
    base = model_of(folder / "base/rwkv-final.pth")

    def scored(is_unseen):
        kept = [pair for pair, row in zip(tokens, rows, strict=True) if (row["prompt"] in unseen) == is_unseen]
        pairs = pack_pairs([tuple(np.searchsorted(known, part) for part in pair) for pair in kept])
        return pairs.with_ref_logps(score_pairs(base, pairs, 8192), "0" * 64, "fp32")

    save_pairs(folder / "train.save", scored(False))
    return Demo(folder, scored(True))


def accuracy(model, demo):
    return evaluate_pairs(model, demo.held_out, dpo(0.1), 8192)["logps/accuracies"]


@pytest.mark.parametrize(("flags", "saved"), [
    ({"peft": "lora", "lora_r": 16, "lr_init": 5e-3, "epoch_steps": 40}, "adapter-final"),
    ({"peft": "state", "lr_init": 5, "epoch_steps": 250}, "state-final.pth"),
], ids=["lora", "state"])  # fmt: skip
def test_held_out_preferences_are_learned(demo, flags, saved):
    base, out = demo.folder / "base/rwkv-final.pth", demo.folder / flags["peft"]
    run(load_model=base, proj_dir=out, dpo_train_file=demo.folder / "train.save", dpo_beta=0.1, micro_bsz=16, warmup_steps=5,
        lr_final=flags["lr_init"] / 10, **flags)  # fmt: skip
    assert accuracy(model_of(base), demo) < 0.65
    assert accuracy(load_tuned(model_of(base), out / saved), demo) >= 0.85
