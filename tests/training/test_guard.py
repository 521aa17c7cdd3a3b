"""Steps that are not finite: skipped, counted, named, and in the end the end. The faults are real ones, of pair files and weights."""

import numpy as np
import pytest
import runs
import torch
from lives import records
from runs import SHARDED, write_inputs
from rwkv_dpo.base.errors import InputError
from rwkv_dpo.batches.samples import Samples
from rwkv_dpo.batches.settings import BatchSettings
from rwkv_dpo.commands import train
from rwkv_dpo.data.pair_files import load_pairs, save_pairs
from rwkv_dpo.model.checkpoint import save_weights
from rwkv_dpo.training.guard import poisoned, skip_unless_finite

N_PAIRS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Also files of pairs in which the reference log-probs of some rows overflow fp32."""
    folder = tmp_path_factory.mktemp("data")
    pairs = write_inputs(folder, SHARDED, N_PAIRS)
    first = order_of(folder)[:2]
    # Times a beta of 10 that is more than fp32 holds: the margin is minus infinity, the loss infinite, its own gradient finite.
    for name, rows in {"one": first[:1], "all": list(range(N_PAIRS))}.items():
        bad = pairs.ref_logps.copy()
        bad[rows] = 3e38, -3e38
        save_pairs(folder / f"{name}.save", pairs.with_ref_logps(bad, "0" * 64, "fp32"))
    return folder


def order_of(data) -> list[int]:
    """Rows in the order in which steps of one pair take them."""
    samples = Samples(BatchSettings(micro_bsz=1), 1024, 0, 1, 1, None, load_pairs(data / "train.save", None))
    return [samples.of_step(k)[0][0][0].number for k in range(N_PAIRS)]


def flags(data, proj_dir, **changes) -> list[str]:
    own = {"data_file": None, "data_type": None, "dpo_general_corpus_ratio": None, "epoch_save": 0, "lr_final": 1e-3}
    steps = {"epoch_steps": 2, "epoch_count": 1, "micro_bsz": 1}
    return runs.flags(data, proj_dir, **{"dpo_train_file": data / "one.save", "dpo_beta": 10, **own, **steps, **changes})


def weights(path):
    return torch.load(path, weights_only=True)


def test_an_infinite_loss_leaves_weights_and_adam_as_they_were_and_its_pair_is_named(data, tmp_path, caplog):
    """A step of the bad pair and one of a good one end where a step of the good one ends: Adam's first."""
    bad_row, good_row = order_of(data)[:2]
    with caplog.at_level("INFO"):
        train.main(flags(data, tmp_path / "out"))
    assert f"step 1: loss inf, gradient norm nan, skipped; it had pairs in rows {bad_row} of dpo_train_file" in caplog.text
    save_pairs(tmp_path / "train.save", load_pairs(data / "train.save").select([good_row]))
    train.main(flags(data, tmp_path / "good", dpo_train_file=tmp_path / "train.save", epoch_steps=1))
    for name, weight in weights(tmp_path / "good" / "rwkv-final.pth").items():
        assert torch.equal(weights(tmp_path / "out" / "rwkv-final.pth")[name], weight), name
    got = records(tmp_path / "out")
    assert [(r["skipped_steps"], r["pairs_seen"]) for r in got] == [(1, 1), (1, 2)]
    assert (got[0]["loss"], got[0]["grad_norm"]) == (None, None)
    assert got[1]["loss"] == records(tmp_path / "good")[0]["loss"]


def test_after_max_bad_steps_in_a_row_the_run_ends_with_the_weights_before_them(data, tmp_path):
    with pytest.raises(InputError, match=r"stopped at step 3: loss inf.* after 3 such steps in a row \(--max_bad_steps\).*rwkv-last-good"):
        train.main(flags(data, tmp_path, dpo_train_file=data / "all.save", epoch_steps=6, max_bad_steps=3))
    assert [r["skipped_steps"] for r in records(tmp_path)] == [1, 2, 3]
    assert not (tmp_path / "rwkv-final.pth").exists()
    before = weights(data / "model.pth")
    assert all(torch.equal(before[name], weight) for name, weight in weights(tmp_path / "rwkv-last-good.pth").items())


@pytest.mark.parametrize(("peft", "name"), [("lora", "adapter-last-good"), ("state", "state-last-good.pth")])
def test_the_last_good_weights_of_an_adapter_are_taken_up_like_any_others(data, tmp_path, peft, name):
    bad = {"peft": peft, "dpo_train_file": data / "all.save", "epoch_steps": 6, "max_bad_steps": 3}
    with pytest.raises(InputError, match=rf"weights before them: \S*{name}$"):
        train.main(flags(data, tmp_path / "out", **bad))
    on = {"peft": peft, "peft_load": tmp_path / "out" / name, "dpo_train_file": data / "train.save", "epoch_steps": 1}
    train.main(flags(data, tmp_path / "on", **on))
    (first,) = records(tmp_path / "on")
    assert first["ref_logps/chosen"] == pytest.approx(first["logps/chosen"], rel=1e-5)  # an adapter at its start changes nothing


@pytest.mark.parametrize(("changes", "told"), [
    ({"max_bad_steps": 2}, "rwkv-last-good.pth"), ({"epoch_steps": 2}, "rwkv-0.pth"), ({"epoch_steps": 2, "epoch_save": 1}, "rwkv-0.pth"),
], ids=str)  # fmt: skip
def test_weights_that_are_not_finite_are_never_saved(data, tmp_path, caplog, changes, told):
    broken = weights(data / "model.pth")
    broken["blocks.1.att.key.weight"][3, 2] = float("nan")
    save_weights(broken, tmp_path / "broken.pth")
    message = rf"{told}: not written: blocks.1.att.key.weight is not finite \(bad steps, .* step 2.*\); nothing was saved to continue from$"
    with pytest.raises(InputError, match=message):
        train.main(flags(data, tmp_path / "out", load_model=tmp_path / "broken.pth", save_every=1, **{"epoch_steps": 4, **changes}))
    assert not list((tmp_path / "out").rglob("*.pth"))
    assert "step 1: blocks.1.att.key.weight is not finite; nothing is saved" in caplog.text


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(data, tmp_path):
    train.main(flags(data, tmp_path, epoch_steps=3 * N_PAIRS, max_bad_steps=2))
    assert records(tmp_path)[-1]["skipped_steps"] == 3


def test_weights_that_overflow_are_named_with_corpus_windows(data, tmp_path, caplog):
    broken = weights(data / "model.pth")
    broken["head.weight"] *= 1e38
    save_weights(broken, tmp_path / "broken.pth")
    corpus = {"data_file": data / "corpus.bin", "data_type": "uint16", "dpo_general_corpus_ratio": 0.5}
    with caplog.at_level("INFO"), pytest.raises(InputError, match="stopped at step 1: loss"):
        train.main(flags(data, tmp_path / "out", load_model=tmp_path / "broken.pth", max_bad_steps=1, **corpus))
    assert "corpus windows from tokens" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_every_rank_skips_the_step_that_is_bad_on_one(data, tmp_path, lives, strategy):
    """A step with the bad pair and one of two good ones end where a step of those two ends, to the bit: two processes add up the same
    two gradients, and a + b is b + a."""
    log, two = tmp_path / "log.txt", {"devices": 2, "strategy": strategy}
    lives.trained(flags(data, tmp_path / "out", **two), log, 2)
    assert "step 1: loss inf, gradient norm" in log.read_text()
    assert f"pairs in rows {order_of(data)[0]} of dpo_train_file" in log.read_text()
    save_pairs(tmp_path / "train.save", load_pairs(data / "train.save").select(order_of(data)[2:4]))
    lives.trained(flags(data, tmp_path / "good", **two, dpo_train_file=tmp_path / "train.save", epoch_steps=1), log, 2)
    before, good = weights(data / "model.pth"), weights(tmp_path / "good" / "rwkv-final.pth")
    for name, weight in weights(tmp_path / "out" / "rwkv-final.pth").items():
        assert torch.equal(good[name], weight), name
    assert not any(torch.equal(before[name], weight) for name, weight in good.items() if name.endswith("weight"))
    got = records(tmp_path / "out")
    assert [(r["skipped_steps"], r["pairs_seen"]) for r in got] == [(1, 2), (1, 4)]
    assert got[1]["loss"] == records(tmp_path / "good")[0]["loss"]
    stopped = flags(data, tmp_path / "stopped", **two, dpo_train_file=data / "all.save", max_bad_steps=2)
    assert lives.whole(stopped, log, 2) == [2, 0], log.read_text()
    assert all(torch.equal(before[name], weight) for name, weight in weights(tmp_path / "stopped" / "rwkv-last-good.pth").items())


def test_an_overflow_of_fp16_is_scaled_and_not_counted(data, tmp_path, caplog):
    """A loss scale of 65,536 overflows at first where the gradient is large; the scale is halved until it fits."""
    large = weights(data / "model.pth")
    large["head.weight"] *= 30
    save_weights(large, tmp_path / "large.pth")
    corpus = {"data_file": data / "corpus.bin", "data_type": "uint16", "dpo": 0, "load_model": tmp_path / "large.pth"}
    train.main(flags(data, tmp_path / "out", precision="fp16", max_bad_steps=1, epoch_steps=16, **corpus))
    got = records(tmp_path / "out")
    assert got[0]["grad_norm"] is None
    assert got[-1]["grad_norm"] is not None
    assert got[-1]["skipped_steps"] == 0
    assert "skipped" not in caplog.text


def test_fp16_clips_and_reports_the_gradient_and_not_the_scaled_one(data, tmp_path):
    for precision in ("fp16", "fp32"):
        train.main(flags(data, tmp_path / precision, precision=precision, dpo_train_file=data / "train.save", dpo_beta=0.01))
    a, b = (records(tmp_path / precision)[0]["grad_norm"] for precision in ("fp16", "fp32"))
    assert a == pytest.approx(b, rel=0.02)  # fp16 has 11 bits


def test_poison_leaves_a_finite_loss_and_its_gradient_bit_for_bit():
    loss = torch.tensor([0.3, -0.0, 1e38], requires_grad=True)
    poisoned(loss).sum().backward()
    assert torch.equal(poisoned(loss), loss)
    assert torch.equal(loss.grad, torch.ones(3))
    for value in (float("inf"), float("-inf"), float("nan")):
        loss = torch.tensor(value, requires_grad=True)
        poisoned(loss).backward()
        assert torch.isnan(loss.grad)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, fused=True), lambda p: torch.optim.AdamW(p), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
], ids=["fused", "AdamW", "SGD"])  # fmt: skip
def test_any_optimizer_passes_over_a_step_that_is_not_finite(make):
    parameters = {name: torch.nn.Parameter(torch.ones(5)) for name in ("skipped", "plain")}
    for name, parameter in parameters.items():
        optimizer = make([parameter])
        for gradient in (1.0, float("nan"), 2.0):
            if name == "plain" and not np.isfinite(gradient):
                continue
            parameter.grad = torch.full((5,), gradient)
            skip_unless_finite(optimizer, [parameter], parameter.grad.norm())
            optimizer.step()
    assert torch.equal(parameters["skipped"], parameters["plain"])
