"""Adapters and states on two CPU processes train as on one."""

import pytest
import torch
from rwkv_dpo.batches.forest import ForestBuilder
from rwkv_dpo.model.checkpoint import load_model
from rwkv_dpo.tuning.tuning import load_tuned
from test_many_processes import data, trained  # noqa: F401  # `data` is a fixture

pytestmark = pytest.mark.slow
FLAGS = {
    "lora": {"peft": "lora", "lora_r": 4, "train_extra": "ln", "epoch_steps": 10},
    "dora": {"peft": "dora", "lora_r": 4, "epoch_steps": 10},
    "pissa": {"peft": "pissa", "lora_r": 4, "weight_decay": 0, "epoch_steps": 10},
    "state": {"peft": "state", "lr_init": 1e-2, "epoch_steps": 10},
}


def logits(data, folder, method):  # noqa: F811
    model = load_model(data / "model.pth", device=torch.device("cpu"), compute_dtype=torch.float32, wkv_backend="chunked")
    if folder is not None:
        load_tuned(model, folder / ("state-final.pth" if method == "state" else "adapter-final"))
    builder = ForestBuilder()
    builder.add(list(range(1, 60)))
    with torch.no_grad():
        return model.head(model(builder.build()[0])[0])


@pytest.fixture(scope="module")
def one_process(lives, data, tmp_path_factory):  # noqa: F811
    results = {}

    def result(method):
        if method not in results:
            folder = tmp_path_factory.mktemp(method) / "out"
            trained(lives, data, folder, **{"micro_bsz": 2, **FLAGS[method]})
            results[method] = logits(data, folder, method)
        return results[method]

    return result


@pytest.mark.parametrize(("method", "changes"), [
    ("lora", {"strategy": "ddp"}), ("lora", {"strategy": "deepspeed_stage_2"}), ("lora", {"strategy": "ddp", "grad_cp": 1}),
    ("lora", {"strategy": "deepspeed_stage_2", "precision": "bf16"}), ("dora", {"strategy": "ddp"}),
    ("pissa", {"strategy": "deepspeed_stage_2"}), ("state", {"strategy": "ddp"}), ("state", {"strategy": "deepspeed_stage_2"}),
], ids=str)  # fmt: skip
def test_two_processes_train_as_one(lives, data, tmp_path, one_process, method, changes):  # noqa: F811
    trained(lives, data, tmp_path / "out", devices=2, **FLAGS[method], **changes)
    got, want = logits(data, tmp_path / "out", method), one_process(method)
    assert (want - logits(data, None, method)).abs().max() > 1e-3
    # fp32 sums of gradients in another order, after ten steps of Adam; in bf16 its rounding.
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 if "precision" not in changes else 0.05)
