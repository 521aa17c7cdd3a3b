"""Reference scores come from a checkpoint, whole or in instalments, and are those of the training objective."""

import numpy as np
import pytest
import torch
from conftest import random_model
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.data.pairs import pack_pairs
from rwkv_dpo.evaluation import reference
from rwkv_dpo.evaluation.reference import JOURNAL, discard_journal, score_with_checkpoint
from rwkv_dpo.evaluation.scoring import score_batch, scoring_batches
from rwkv_dpo.files.hashed import file_sha256
from rwkv_dpo.model.checkpoint import load_model, save_weights

SETTINGS = {"device": "cpu", "precision": "fp32", "batch_tokens": 60, "wkv_backend": "chunked"}


@pytest.fixture
def checkpoint(tmp_path, tiny_shape):
    save_weights(random_model(tiny_shape, torch.float32).state_dict(), tmp_path / "tiny.pth")
    return tmp_path / "tiny.pth"


def some_pairs(n=40):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 61, n) for n in rng.integers(1, 20, n // 3)]
    return pack_pairs([(prompts[i % len(prompts)], *(rng.integers(0, 61, n) for n in rng.integers(1, 20, 2))) for i in range(n)])


def counted(monkeypatch):
    """Real scoring, with a list of the sizes of the batches that were computed."""
    sizes = []

    def score(model, pairs, rows, batch_tokens):
        sizes.append(len(rows))
        return score_batch(model, pairs, rows, batch_tokens)

    monkeypatch.setattr(reference, "score_batch", score)
    return sizes


def test_scores_are_each_pairs_own_and_the_header_names_the_checkpoint(checkpoint, tmp_path):
    pairs, told = some_pairs(), []
    scored = score_with_checkpoint(pairs, checkpoint, tmp_path, **SETTINGS, progress=told.append)
    assert scored.header == {"reference_sha256": file_sha256(checkpoint), "reference_precision": "fp32"}
    assert sum(told) == len(pairs)
    assert len(told) > 5
    model = load_model(checkpoint, device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="reference")
    alone = np.concatenate([score_batch(model, pairs, np.array([i]), 1000) for i in range(len(pairs))])
    # fp32 sums of up to 20 terms, in another order.
    np.testing.assert_allclose(scored.ref_logps, alone, rtol=1e-5)


def test_a_run_that_was_cut_off_goes_on_with_the_next_batch(checkpoint, tmp_path, monkeypatch):
    pairs = some_pairs()
    whole = score_with_checkpoint(pairs, checkpoint, tmp_path, **SETTINGS)
    discard_journal(tmp_path)
    assert not (tmp_path / JOURNAL).exists()

    for n_batches in (1, 3):
        told = []

        def cut_off(n, told=told, n_batches=n_batches):
            told.append(n)
            if len(told) == n_batches:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            score_with_checkpoint(pairs, checkpoint, tmp_path, **SETTINGS, progress=cut_off)
    sizes = counted(monkeypatch)
    resumed = score_with_checkpoint(pairs, checkpoint, tmp_path, **SETTINGS)
    assert len(sizes) == len(scoring_batches(pairs, 60)) - 3
    assert resumed.ref_logps.tobytes() == whole.ref_logps.tobytes()
    sizes.clear()
    assert score_with_checkpoint(pairs, checkpoint, tmp_path, **SETTINGS).ref_logps.tobytes() == whole.ref_logps.tobytes()
    assert sizes == []


@pytest.mark.parametrize("change", ["pairs", "checkpoint", "precision", "batch_tokens"])
def test_other_pairs_another_checkpoint_or_other_settings_begin_anew(checkpoint, tmp_path, monkeypatch, tiny_shape, change):
    pairs, settings = some_pairs(), dict(SETTINGS)
    score_with_checkpoint(pairs, checkpoint, tmp_path, **settings)
    if change == "pairs":
        pairs = some_pairs(39)
    elif change == "checkpoint":
        save_weights(random_model(tiny_shape, torch.float32, seed=1).state_dict(), checkpoint)
    else:
        settings |= {"precision": "bf16"} if change == "precision" else {"batch_tokens": 61}
    sizes = counted(monkeypatch)
    score_with_checkpoint(pairs, checkpoint, tmp_path, **settings)
    assert sum(sizes) == len(pairs)


def test_a_full_disk_is_one_line():
    """/dev/full takes nothing; the journal of a killed run is the only file that scoring writes."""
    from rwkv_dpo.files.journal import Journal

    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(InputError, match=r"x: cannot be written: No space left"):
        Journal("x", full, []).append(b"payload")
