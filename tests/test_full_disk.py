"""Disks that are full, small ones mounted for the purpose: one line names the file, and what lay there before lies there as it was."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.commands import evaluate, export, make_data, prepare_pairs
from rwkv_dpo.data.pair_files import save_original, save_pairs
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.data.tokenizer import VOCAB_SIZE
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.model.shape import ModelShape

# Of a disk; of that for pairs, which take long to score.
KILOBYTES, FOR_PAIRS = 100, 30


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    shape = ModelShape(n_layer=1, n_embd=16, dim_att=16, dim_ffn=32, vocab_size=VOCAB_SIZE, head_size=8)
    save_weights(random_model(shape, torch.float32).state_dict(), folder / "model.pth")
    draw = np.random.default_rng(0)
    words = ["sun", "moon", "stars", "rain", "and", "or", "of"]
    for name, n_words in {"short": 15_000, "long": 60_000}.items():
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": " ".join(draw.choice(words, n_words))}) + "\n")
    rows = [{"prompt": f"{i}?", "chosen": " ".join(draw.choice(words, 20)), "rejected": "No."} for i in range(300)]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder


def many_pairs():
    return pack_pairs([([1, 2], [3] * 60_000, [4])], np.zeros((1, 2)))


def fill(out):
    disk = os.statvfs(out)
    (out / "filler").write_bytes(bytes(disk.f_bavail * disk.f_bsize))


# What is run, with the file that is told of; the room is too small for what each writes.
WRITERS = {
    "documents on their way": ("corpus.bin", lambda inputs, out: make_data.main([f"{inputs}/long.jsonl", "--out", f"{out}/corpus"])),
    "a corpus": ("corpus.bin", lambda inputs, out: make_data.main([f"{inputs}/short.jsonl", "3", "--out", f"{out}/corpus"])),
    "pairs": ("train.save", lambda inputs, out: save_pairs(out / "train.save", many_pairs())),
    "pairs in the original's form": ("train.save", lambda inputs, out: save_original(out / "train.save", many_pairs())),
    "splits": ("trainset.save", lambda inputs, out: prepare_pairs.main([
        "--source", f"{inputs}/pairs.json", "--load_model", f"{inputs}/model.pth", "--out_dir", str(out), "--device", "cpu",
        "--wkv_backend", "reference", "--templates", "chat", "--overwrite", "1",
    ])),
    "a checkpoint": ("model.pth", lambda inputs, out: export.main([
        "--load_model", f"{inputs}/model.pth", "--out", f"{out}/model.pth", "--overwrite", "1", "--wkv_backend", "reference",
    ])),
    "a checkpoint as safetensors": ("model.safetensors", lambda inputs, out: export.main([
        "--load_model", f"{inputs}/model.pth", "--out", f"{out}/model.safetensors", "--overwrite", "1", "--wkv_backend", "reference",
    ])),
    "a report": ("report.json", lambda inputs, out: (fill(out), evaluate.main([
        "--load_model", f"{inputs}/model.pth", "--out", f"{out}/report.json", "--device", "cpu", "--wkv_backend", "reference",
    ]))),
}  # fmt: skip


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_is_half_written_and_nothing_lost(inputs, mount_disk, writer):
    out = mount_disk(FOR_PAIRS if writer == "splits" else KILOBYTES)
    told, write = WRITERS[writer]
    before = {name: f"the {name} of before".encode() for name in dict.fromkeys([told, "corpus.idx", "report.json"])}
    for name, content in before.items():
        (out / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{told}: cannot be written: No space left on device$"):
        write(inputs, out)
    left = {path.name: path.read_bytes() for path in Path(out).iterdir() if path.name not in ("filler", "reference.journal")}
    assert left == before
